/* Rows of the tile table from Python: a tuner's candidates, or what it found on a card. */
#ifndef FA_TILE_ROWS_H
#define FA_TILE_ROWS_H

#include <Python.h>

#include "tiles.h"

/* The names of a row's numbers, in order: a tuple of strings. */
PyObject *fa_tile_fields(void);

/* The rows of tiles.c: a list of such tuples as fa_use_tiles() takes. */
PyObject *fa_tiles(void);

/* Replaces `list` by a sequence of rows, tuples of ints in the order of fa_tile_fields(). 0, or -1
 * with TypeError or ValueError set and the list as it was. */
int fa_use_tiles(PyObject *rows, struct fa_tile_list *list);

/* The same of the rows for the backward: tuples in the order of struct fa_backward_tile. */
int fa_use_backward_tiles(PyObject *rows, struct fa_tile_list *list);

void fa_tile_rows_clear(struct fa_tile_list *list);

#endif
