/* levels.h - the levels that a weight may take, for calibrate.cu and sweep.cu: the definitions of
 * csrc/calibrate.h, with the threads of a row sharing its levels. */
#ifndef BITDELTA_LEVELS_H_
#define BITDELTA_LEVELS_H_

#include "gpu.h"

/* The planes' terms summed in order; bit p of the code is plane p's sign. */
static __device__ __forceinline__ float
bd_level_of(int code, int P, const float scale[BD_MAX_PLANES])
{
    float level = code & 1 ? scale[0] : -scale[0];
    BD_UNROLL
    for (int p = 1; p < BD_MAX_PLANES; p++) {
        if (p < P) {
            level = __fadd_rn(level, code >> p & 1 ? scale[p] : -scale[p]);
        }
    }
    return level;
}

/* The code of the level nearest to r, of equal ones the highest; the common answer of LANES threads, all of
 * which have the same r and scales. Whole warps only. */
template <int LANES>
static __device__ __forceinline__ int
bd_nearest(float r, int lane, int P, const float scale[BD_MAX_PLANES])
{
    const int last = (1 << P) - 1;
    float best = __uint_as_float(0x7F800000u);
    int code = -1;
    for (int c = last - lane; c >= 0; c -= LANES) {
        const float away = fabsf(__fsub_rn(r, bd_level_of(c, P, scale)));
        if (c == last) { /* stays where its distance is no number: nothing is nearer then */
            best = away != away ? -1.0f : away;
            code = c;
        } else if (away < best) {
            best = away;
            code = c;
        }
    }
    BD_UNROLL
    for (int distance = LANES / 2; distance > 0; distance /= 2) {
        const float other = __shfl_xor_sync(0xFFFFFFFFu, best, distance, LANES);
        const int its = __shfl_xor_sync(0xFFFFFFFFu, code, distance, LANES);
        if (other < best || (other == best && its > code)) {
            best = other;
            code = its;
        }
    }
    return code;
}

#endif /* BITDELTA_LEVELS_H_ */
