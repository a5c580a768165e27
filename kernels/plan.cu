/* plan.cu - groups the rows of a batch by tenant, on the device: a stable counting sort by one block.
 *
 * Ids are read where they lie, so that the host needs to know nothing and a CUDA graph can be replayed
 * with other tenants. Slots of the sort: 0 = ids out of range, 1 = no tenant, t + 2 = tenant t.
 * One block: a batch has some hundred rows, which is latency, not work. */
#include "gpu.h"
#include "plan.h"

namespace
{

enum { THREADS = 256, WARPS = THREADS / 32 };

struct counters {
    int *count, *place, *segment, *cursor; /* [T + 2] each; cursor: rows placed so far */
    int *rows, *places, *few, *many; /* [THREADS]: sums of the slots of a thread, then before it */
};

__device__ int
slot_of(int64_t id, int T)
{
    return id < -1 || id >= T ? 0 : static_cast<int>(id) + 2;
}

__device__ int
is_many(int slot, int count, int few_rows)
{
    return slot >= 2 && count > few_rows;
}

__device__ int
round_up(int count, int unit)
{
    return (count + unit - 1) / unit;
}

/* value[i] becomes the sum of value[0 .. i]. */
__device__ void
scan(int *value)
{
    const int i = static_cast<int>(threadIdx.x);
    for (int distance = 1; distance < THREADS; distance *= 2) {
        const int before = i >= distance ? value[i - distance] : 0;
        __syncthreads();
        value[i] += before;
        __syncthreads();
    }
}

/* Where each slot's rows, places and segments begin. */
__device__ void
lay_out(const counters &own, int n_slots, int few_rows, const bd_plan &plan)
{
    const int i = static_cast<int>(threadIdx.x), n_own = round_up(n_slots, THREADS);
    const int first = min(i * n_own, n_slots), end = min(first + n_own, n_slots);
    int rows = 0, places = 0, few = 0, many = 0;
    for (int s = first; s < end; s++) {
        const int count = own.count[s];
        rows += count;
        places += round_up(count, BD_ROW_BLOCK);
        few += is_many(s, count, few_rows) ? 0 : round_up(count, BD_FEW_ROWS);
        many += is_many(s, count, few_rows) ? round_up(count, BD_MANY_ROWS) : 0;
    }
    own.rows[i] = rows;
    own.places[i] = places;
    own.few[i] = few;
    own.many[i] = many;
    __syncthreads();
    scan(own.rows);
    scan(own.places);
    scan(own.few);
    scan(own.many);
    if (i == THREADS - 1) {
        plan.counts[0] = own.few[i];
        plan.counts[1] = own.many[i];
        plan.counts[2] = own.places[i];
        plan.starts[n_slots] = own.rows[i];
    }
    rows = own.rows[i] - rows;
    places = own.places[i] - places;
    few = own.few[i] - few;
    many = own.many[i] - many;
    for (int s = first; s < end; s++) {
        const int count = own.count[s], has_many = is_many(s, count, few_rows);
        plan.starts[s] = rows;
        own.cursor[s] = 0;
        own.place[s] = places * BD_ROW_BLOCK;
        own.segment[s] = has_many ? many : few;
        rows += count;
        places += round_up(count, BD_ROW_BLOCK);
        few += has_many ? 0 : round_up(count, BD_FEW_ROWS);
        many += has_many ? round_up(count, BD_MANY_ROWS) : 0;
    }
    __syncthreads();
}

/* How many rows of this warp before this one have its slot, and how many have it in all. */
__device__ int2
rank_in_warp(int slot)
{
    const int lane = static_cast<int>(threadIdx.x % 32);
    int2 rank = {0, 0};
    for (int other = 0; other < 32; other++) {
        const int is_same = __shfl_sync(0xFFFFFFFFu, slot, other) == slot;
        rank.x += other < lane ? is_same : 0;
        rank.y += is_same;
    }
    return rank;
}

/* Row m is the index-th of its slot. */
__device__ void
place_row(const counters &own, int m, int slot, int index, int few_rows, const bd_plan &plan)
{
    const int count = own.count[slot], has_many = is_many(slot, count, few_rows);
    const int place = own.place[slot] + index, unit = has_many ? BD_MANY_ROWS : BD_FEW_ROWS;
    const int kind = slot < 2 ? BD_KIND_NONE : has_many ? BD_KIND_MANY : BD_KIND_FEW;
    plan.rows[plan.starts[slot] + index] = make_int4(m, slot - 2, place, kind);
    plan.batch[place] = m;
    if (index % BD_ROW_BLOCK == 0) {
        const int n_left = count - index;
        plan.blocks[place / BD_ROW_BLOCK] =
            make_int2(slot - 2, n_left < BD_ROW_BLOCK ? n_left : BD_ROW_BLOCK);
    }
    if (index % unit == 0) {
        int4 *segments = has_many ? plan.many : plan.few;
        segments[own.segment[slot] + index / unit] =
            make_int4(slot - 2, place, min(unit, count - index), 0);
    }
}

__global__ void
__launch_bounds__(THREADS)
    group_rows(const int64_t *tenant_ids, int M, int T, int few_rows, bd_plan plan)
{
    BD_SHARED(int, memory);
    const int n_slots = T + 2, thread = static_cast<int>(threadIdx.x);
    counters own;
    own.count = memory;
    own.place = own.count + n_slots;
    own.segment = own.place + n_slots;
    own.cursor = own.segment + n_slots;
    own.rows = own.cursor + n_slots;
    own.places = own.rows + THREADS;
    own.few = own.places + THREADS;
    own.many = own.few + THREADS;
    for (int s = thread; s < n_slots; s += THREADS) {
        own.count[s] = 0;
    }
    __syncthreads();
    for (int m = thread; m < M; m += THREADS) {
        atomicAdd(&own.count[slot_of(__ldg(tenant_ids + m), T)], 1);
    }
    __syncthreads();
    lay_out(own, n_slots, few_rows, plan);
    for (int first = 0; first < M; first += THREADS) {
        const int m = first + thread, has_row = m < M;
        const int slot = has_row ? slot_of(__ldg(tenant_ids + m), T) : -1;
        const int2 rank = rank_in_warp(slot);
        const int n_warps = min(static_cast<int>(WARPS), round_up(M - first, 32));
        int index = 0;
        for (int warp = 0; warp < n_warps; warp++) { /* one after the other: the sort is stable */
            if (warp == thread / 32) {
                index = has_row ? own.cursor[slot] + rank.x : 0;
                __syncwarp();
                if (has_row && rank.x == rank.y - 1) {
                    own.cursor[slot] += rank.y;
                }
            }
            __syncthreads();
        }
        if (has_row) {
            place_row(own, m, slot, index, few_rows, plan);
        }
    }
}

} /* namespace */

extern "C" size_t
bd_cuda_plan_bytes(int64_t M, int64_t T)
{
    size_t n_bytes;
    bd_plan_parts(NULL, M, T, &n_bytes);
    return n_bytes;
}

extern "C" bd_status
bd_cuda_plan(const bd_cuda_context *ctx, const int64_t *tenant_ids, int64_t M, int64_t T,
             void *plan)
{
    if (M < 0 || M > BD_CUDA_MAX_ROWS || T < 0 || T > BD_CUDA_MAX_TENANTS) {
        return BD_ERR_ARGUMENT;
    }
    size_t n_bytes;
    const bd_plan parts = bd_plan_parts(plan, M, T, &n_bytes);
    const size_t shared_bytes = static_cast<size_t>(4 * (T + 2) + 4 * THREADS) * sizeof(int);
    return BD_LAUNCH(group_rows, dim3(1), dim3(THREADS), shared_bytes, ctx->stream, tenant_ids,
                     static_cast<int>(M), static_cast<int>(T),
                     bd_gpu_has_b1(ctx->capability) ? BD_FEW_ROWS : 0, parts);
}
