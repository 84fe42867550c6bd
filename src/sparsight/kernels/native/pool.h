/* Loops on several threads: torch's own where its OpenMP runtime is at hand, since threads of another
 * pool would have to share the processors with torch's, which spin for a while after each operation;
 * else those of a small pool, which runs one loop at a time. */
#ifndef SPARSIGHT_POOL_H
#define SPARSIGHT_POOL_H

#include <stdint.h>

/* What Python calls. */
#define API __attribute__((visibility("default")))

/* Call body(context, i) for each i in [0, n), on at most `threads` threads, in any order. */
void parallel_for(int64_t n, int threads, void (*body)(void *context, int64_t i), void *context);

/* Memory of the calling thread that is kept between calls, until the thread ends; contents are lost
 * when it grows. */
void *scratch(int slot, int64_t bytes);

#endif
