/* A pool of threads that run one loop at a time. */
#ifndef SPARSIGHT_POOL_H
#define SPARSIGHT_POOL_H

#include <stdint.h>

/* Call body(context, i) for each i in [0, n), on at most `threads` threads, in any order. */
void parallel_for(int64_t n, int threads, void (*body)(void *context, int64_t i), void *context);

/* Memory of the calling thread that is kept between calls; contents are lost when it grows. */
void *scratch(int slot, int64_t bytes);

#endif
