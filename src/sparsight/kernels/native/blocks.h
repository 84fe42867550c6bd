/* A code with many entries a vector, as a sparse matrix in blocks of columns.
 *
 * Its columns name rows of numbers that are summed, or multiplied with: while the rows that belong to a
 * block stay in the cache, all that need them come by. With vectors for rows the code's own order
 * serves, since its latents rise. With latents for rows the entries stand block after block, in a block
 * row after row.
 */
#ifndef SPARSIGHT_BLOCKS_H
#define SPARSIGHT_BLOCKS_H

#include <stdint.h>

enum {
    BLOCK = 96, /* columns */
    AHEAD = 6   /* rows whose entries are fetched beforehand */
};

typedef struct {
    int64_t n_rows, n_columns;
    int32_t *starts;  /* [blocks, n_rows] and more: where the entries of a block's row begin */
    int32_t *columns; /* [entries] */
    int32_t *entries; /* [entries]: their places in the code; of no use where they are the same */
    int64_t to_end;   /* from where the start stands to where the end does */
} Blocks;

#endif
