/* plan.h - the work list that plan.cu makes of a batch, in device memory.
 *
 * Rows are sorted by tenant, those of a tenant in the batch's order. Each tenant's first row gets a place
 * that is a multiple of 8, so that fragments of 8 rows never mix tenants; data of rows is kept by place.
 *
 *   counts   n_few, n_many, n_blocks
 *   starts   [T + 3]        of lost rows, rows without a tenant, tenants 0 .. T-1; the end
 *   rows     [M]            {row of the batch, tenant, place, kind}
 *   batch    [n_places]     row of the batch, by place; unset between tenants
 *   blocks   [n_places / 8] {tenant, rows in it}
 *   few      [M]            {tenant, first place, n_rows <= BD_FEW_ROWS, 0}: tenants with few rows, and
 *                           rows without one
 *   many     [M]            {tenant, first place, n_rows <= BD_MANY_ROWS, 0} */
#ifndef BITDELTA_PLAN_H_
#define BITDELTA_PLAN_H_

#include "cuda.h"

#define BD_NO_TENANT (-1)
#define BD_LOST (-2) /* an id out of range: NaN */

#define BD_ROW_BLOCK 8  /* columns of a tensor core's B operand */
#define BD_FEW_ROWS 4   /* 16 bit planes each: beyond, two 8-bit pieces cost less */
#define BD_MANY_ROWS 32 /* 64 accumulators a thread */

enum { BD_KIND_NONE = 0, BD_KIND_FEW = 1, BD_KIND_MANY = 2 };

typedef struct {
    int *counts, *starts;
    int4 *rows;
    int *batch;
    int2 *blocks;
    int4 *few, *many;
} bd_plan;

/* Every tenant with rows may leave 7 places empty. */
static inline int64_t
bd_plan_places(int64_t M, int64_t T)
{
    return (M + (BD_ROW_BLOCK - 1) * (M < T + 2 ? M : T + 2) + BD_ROW_BLOCK - 1) / BD_ROW_BLOCK *
           BD_ROW_BLOCK;
}

/* The parts of a plan at `start`; *n_bytes becomes their size. */
static inline bd_plan
bd_plan_parts(void *start, int64_t M, int64_t T, size_t *n_bytes)
{
    char *at = static_cast<char *>(start), *const begin = at;
    bd_plan plan;
    plan.counts = reinterpret_cast<int *>(at);
    at += 16;
    plan.starts = reinterpret_cast<int *>(at);
    at += (T + 3 + 3) / 4 * 16;
    plan.rows = reinterpret_cast<int4 *>(at);
    at += M * 16;
    plan.few = reinterpret_cast<int4 *>(at);
    at += M * 16;
    plan.many = reinterpret_cast<int4 *>(at);
    at += M * 16;
    plan.blocks = reinterpret_cast<int2 *>(at);
    at += bd_plan_places(M, T) / BD_ROW_BLOCK * 8;
    plan.batch = reinterpret_cast<int *>(at);
    at += bd_plan_places(M, T) * 4;
    *n_bytes = static_cast<size_t>(at - begin);
    return plan;
}

#endif /* BITDELTA_PLAN_H_ */
