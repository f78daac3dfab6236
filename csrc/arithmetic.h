/* What C has no operators for. Arguments are evaluated twice. */
#ifndef FA_ARITHMETIC_H
#define FA_ARITHMETIC_H

#define MIN(a, b)      ((a) < (b) ? (a) : (b))
#define MAX(a, b)      ((a) > (b) ? (a) : (b))
#define CEIL_DIV(a, b) (((a) + (b) - 1) / (b))

#endif
