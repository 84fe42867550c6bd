/* A code with many entries a vector, as a sparse matrix in blocks of columns.
 *
 * Its columns name rows of numbers that are summed, or multiplied with. Entries stand block after block,
 * in a block row after row: while the rows that belong to a block stay in the cache, all that need them
 * come by.
 */
#ifndef SPARSIGHT_BLOCKS_H
#define SPARSIGHT_BLOCKS_H

#include <stdint.h>

enum { BLOCK = 96 }; /* columns of a block */

typedef struct {
    int64_t n_rows, n_columns;
    int32_t *starts;  /* [blocks * n_rows + 1]: where the entries of a block's row begin */
    int32_t *columns; /* [entries] */
    int32_t *entries; /* [entries]: their places in the code */
} Blocks;

#endif
