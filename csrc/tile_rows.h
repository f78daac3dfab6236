/* Rows of the tile table from Python: a tuner's candidates, or what it found on a card. */
#ifndef FA_TILE_ROWS_H
#define FA_TILE_ROWS_H

#include <Python.h>

#include "tiles.h"

/* The names of a row's numbers, in order: a tuple of strings. */
PyObject *fa_tile_fields(enum fa_direction direction);

/* The rows of tiles.c: a list of such tuples as fa_use_tiles() takes, with the bounds that a row is
 * above where it has any. */
PyObject *fa_tiles(enum fa_direction direction);

/* Replaces those of a direction in `list` by a sequence of rows: tuples of ints in the order of
 * fa_tile_fields(), with the bounds that they are above or without. 0, or -1 with TypeError or
 * ValueError set and the list as it was. */
int fa_use_tiles(PyObject *rows, enum fa_direction direction, struct fa_tile_list *list);

void fa_tile_rows_clear(struct fa_tile_list *list);

#endif
