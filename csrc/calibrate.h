/* calibrate.h - the levels that a weight may take, for 16 rows at once. Private.
 *
 * Level c of a row is Q = +-s_0, +-s_1, ... summed in plane order, s_p = row_p, or fp32(row_p column_p);
 * bit p of c set: +s_p. */
#ifndef BITDELTA_CALIBRATE_H_
#define BITDELTA_CALIBRATE_H_

#include <stdint.h>

#include "bitdelta.h"

enum { BD_MAX_LEVELS = 1 << BD_MAX_PLANES };

typedef float bd_lanes[BD_STRIP_ROWS];

/* What the levels are made of. */
typedef struct {
    const float *row;    /* [P, N] */
    const float *column; /* [P, K], or NULL */
    int64_t N, K;
    int P;
} bd_scales;

/* The 2^P levels of rows first_row ... at column k; rows beyond N get those of the last. */
static inline void
bd_fill_levels(const bd_scales *scales, int64_t first_row, int64_t k, bd_lanes *levels)
{
    for (int p = 0; p < scales->P; p++) {
        for (int64_t i = 0; i < BD_STRIP_ROWS; i++) {
            const int64_t n = first_row + i < scales->N ? first_row + i : scales->N - 1;
            const float row = scales->row[p * scales->N + n];
            const float scale =
                scales->column == NULL ? row : row * scales->column[p * scales->K + k];
            for (int c = (1 << p) - 1; c >= 0; c--) { /* downwards: level c itself is used last */
                const float before = levels[c][i];
                levels[c | 1 << p][i] = p == 0 ? scale : before + scale;
                levels[c][i] = p == 0 ? -scale : before - scale;
            }
        }
    }
}

/* The level nearest to r, |r - level| in fp32, and its number; of equal ones that with the highest. */
static inline void
bd_choose(int n_levels, bd_lanes *levels, const float *r, float *chosen, int32_t *codes)
{
    bd_lanes best;
    for (int i = 0; i < BD_STRIP_ROWS; i++) {
        const float level = levels[n_levels - 1][i], away = r[i] - level;
        best[i] = away < 0 ? -away : away;
        chosen[i] = level;
        codes[i] = n_levels - 1;
    }
    for (int c = n_levels - 2; c >= 0; c--) {
        for (int i = 0; i < BD_STRIP_ROWS; i++) {
            const float level = levels[c][i], away = r[i] - level;
            const float distance = away < 0 ? -away : away;
            const int is_nearer = distance < best[i];
            best[i] = is_nearer ? distance : best[i];
            chosen[i] = is_nearer ? level : chosen[i];
            codes[i] = is_nearer ? c : codes[i];
        }
    }
}

#endif /* BITDELTA_CALIBRATE_H_ */
