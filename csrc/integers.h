/* integers.h - the smaller and the larger of two sizes. Private. */
#ifndef BITDELTA_INTEGERS_H_
#define BITDELTA_INTEGERS_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

static inline int64_t
min_i64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static inline int64_t
max_i64(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

#ifdef __cplusplus
}
#endif

#endif /* BITDELTA_INTEGERS_H_ */
