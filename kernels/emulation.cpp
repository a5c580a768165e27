/* emulation.cpp - runs the launches of emulation.h: threads as coroutines, barriers, warp functions. */
#include "emulation_launch.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "float_state.h"

namespace bd_gpu
{

__thread launch_state *current_launch;
static thread_local char message[512];
static thread_local int
    failed_outside; /* host code of a launcher went wrong: its launch is refused */

static int
name_thread(const launch_state *launch, char *out, size_t n_bytes)
{
    const thread *own = launch->running;
    const dim3 &b = launch->block;
    if (own == nullptr) {
        return snprintf(out, n_bytes, "kernel %s, block (%u, %u, %u): ", launch->shape.name, b.x,
                        b.y, b.z);
    }
    return snprintf(out, n_bytes,
                    "kernel %s, block (%u, %u, %u), thread (%u, %u, %u): ", launch->shape.name, b.x,
                    b.y, b.z, own->index.x, own->index.y, own->index.z);
}

void
fail(const char *format, ...)
{
    launch_state *launch = current_launch;
    int n = launch == nullptr ? 0 : name_thread(launch, message, sizeof message);
    n = n < 0 || n >= static_cast<int>(sizeof message) ? 0 : n;
    va_list arguments;
    va_start(arguments, format);
    (void)vsnprintf(message + n, sizeof message - static_cast<size_t>(n), format, arguments);
    va_end(arguments);
    if (launch == nullptr) {
        failed_outside = 1;
        return;
    }
    launch->has_failed = 1;
    if (launch->running != nullptr) {
        thread *own = launch->running;
        launch->running = nullptr;
        bd_gpu_switch(&own->state_of_cpu, &launch->scheduler);
    }
}

/* ---- where a thread is ---- */

dim3
thread_index()
{
    return current_launch->running->index;
}

dim3
block_index()
{
    return current_launch->block;
}

dim3
block_size()
{
    return current_launch->shape.block;
}

dim3
grid_size()
{
    return current_launch->shape.grid;
}

/* ---- waiting ---- */

static const char *const NAMES[] = {"__syncthreads",   "__syncwarp",     "__shfl_sync",
                                    "__shfl_xor_sync", "__shfl_up_sync", "__shfl_down_sync",
                                    "__ballot_sync",   "bd_mma_b1",      "bd_mma_u8s8"};

static const char *
base_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash == nullptr ? path : slash + 1;
}

/* Gives way to the scheduler, until somebody makes the thread READY again. */
static void
wait(launch_state *launch, thread_state state, function at, unsigned mask, const char *file,
     int line)
{
    thread *own = launch->running;
    own->state = state;
    own->at = at;
    own->mask = mask;
    own->file = file;
    own->line = line;
    launch->waiting[own->id / 32] |= state == WAITS_FOR_WARP ? 1u << (own->id & 31u) : 0u;
    bd_gpu_switch(&own->state_of_cpu, &launch->scheduler);
}

void
pass_time(launch_state *launch)
{
    if (++launch->block_time >> 26) {
        fail("more barriers than the emulation counts");
    }
    for (unsigned warp = 0; warp < (launch->n_threads + 31) / 32; warp++) {
        launch->warp_time[warp]++;
    }
}

void
sync_threads(const char *file, int line)
{
    launch_state *launch = current_launch;
    if (launch->n_at_barrier == 0) {
        launch->barrier_file = file;
        launch->barrier_line = line;
    } else if (launch->barrier_line != line ||
               (launch->barrier_file != file && strcmp(launch->barrier_file, file) != 0)) {
        fail(
            "divergent barrier: it is at __syncthreads of %s:%d, others of its block wait at that "
            "of %s:%d",
            base_name(file), line, base_name(launch->barrier_file), launch->barrier_line);
    }
    if (++launch->n_at_barrier < launch->n_threads) {
        wait(launch, WAITS_FOR_BLOCK, SYNCTHREADS, 0, file, line);
        return;
    }
    launch->n_at_barrier = 0;
    pass_time(launch);
    for (unsigned i = 0; i < launch->n_threads; i++) {
        launch->threads[i].state = READY;
    }
}

/* ---- warp functions: the lane that comes last does them for all ---- */

struct warp_lanes {
    exchange *lane[32]; /* those of the mask */
    unsigned mask, n_lanes;
};

static void
shuffle_lanes(const warp_lanes &w, function which)
{
    uint64_t before[32];
    for (unsigned i = 0; i < 32; i++) {
        before[i] = w.mask >> i & 1u ? w.lane[i]->value : 0;
    }
    for (int i = 0; i < 32; i++) {
        if ((w.mask >> i & 1u) == 0) {
            continue;
        }
        const int width = w.lane[i]->width, operand = w.lane[i]->operand;
        const int begin = i & ~(width - 1), end = begin + width;
        int source = i;
        if (which == SHUFFLE) {
            source = begin | (operand & (width - 1));
        } else if (which == SHUFFLE_XOR) {
            source = (i ^ operand) < end ? i ^ operand : i;
        } else if (which == SHUFFLE_UP) {
            source = i - operand >= begin ? i - operand : i;
        } else {
            source = i + operand < end ? i + operand : i;
        }
        if (source < 0 || source > 31 || (w.mask >> source & 1u) == 0) {
            fail("%s: lane %d reads lane %d, which the mask 0x%08x leaves out", NAMES[which], i,
                 source, w.mask);
            return;
        }
        w.lane[i]->value = before[source];
    }
}

static void
ballot_lanes(const warp_lanes &w)
{
    uint64_t ballot = 0;
    for (unsigned i = 0; i < 32; i++) {
        ballot |= w.mask >> i & 1u ? w.lane[i]->value << i : 0;
    }
    for (unsigned i = 0; i < 32; i++) {
        if (w.mask >> i & 1u) {
            w.lane[i]->value = ballot;
        }
    }
}

static unsigned
dot_b1(const unsigned *a, const unsigned *b)
{
    unsigned sum = 0;
    for (int w = 0; w < 8; w++) {
        sum += static_cast<unsigned>(__builtin_popcount(a[w] & b[w]));
    }
    return sum;
}

static unsigned
dot_u8s8(const unsigned *a, const unsigned *b)
{
    int sum = 0;
    for (int k = 0; k < 32; k++) {
        const int left = static_cast<int>(a[k / 4] >> 8 * (k % 4) & 0xFFu);
        sum += left * static_cast<int8_t>(b[k / 4] >> 8 * (k % 4) & 0xFFu);
    }
    return static_cast<unsigned>(sum);
}

/* The fragments of gpu.h, which are the same in words: a row of A and a column of B are 8 of them, of which
 * a lane has words t and 4 + t. */
static void
multiply_lanes(const warp_lanes &w, function which)
{
    unsigned A[16][8], B[8][8];
    for (unsigned i = 0; i < 32; i++) {
        const unsigned g = i / 4, t = i % 4;
        const exchange &lane = *w.lane[i];
        A[g][t] = lane.a[0];
        A[g + 8][t] = lane.a[1];
        A[g][4 + t] = lane.a[2];
        A[g + 8][4 + t] = lane.a[3];
        B[g][t] = lane.b[0];
        B[g][4 + t] = lane.b[1];
    }
    unsigned (*dot)(const unsigned *, const unsigned *) = which == MMA_B1 ? dot_b1 : dot_u8s8;
    for (unsigned i = 0; i < 32; i++) {
        const unsigned g = i / 4, t = i % 4;
        exchange &lane = *w.lane[i];
        lane.d[0] += dot(A[g], B[2 * t]);
        lane.d[1] += dot(A[g], B[2 * t + 1]);
        lane.d[2] += dot(A[g + 8], B[2 * t]);
        lane.d[3] += dot(A[g + 8], B[2 * t + 1]);
    }
}

static void
complete(launch_state *launch, const warp_lanes &w, function which, unsigned warp)
{
    switch (which) {
        case SYNCWARP:
            if (w.n_lanes == min(32u, launch->n_threads - 32 * warp)) {
                launch->warp_time[warp]++; /* fewer lanes order nothing that is watched */
            }
            break;
        case BALLOT:
            ballot_lanes(w);
            break;
        case MMA_B1:
        case MMA_U8S8:
            multiply_lanes(w, which);
            break;
        default:
            shuffle_lanes(w, which);
    }
}

/* Refuses masks that cannot be right, whoever else comes. */
static unsigned
check_mask(const launch_state *launch, function which, unsigned mask, const exchange *lane,
           const char *file, int line)
{
    const thread *own = launch->running;
    const unsigned first = own->id & ~31u, n_lanes = min(32u, launch->n_threads - first);
    if (which == MMA_B1 || which == MMA_U8S8) {
        if (n_lanes < 32) {
            fail("%s needs 32 lanes, its warp has %u (%s:%d)", NAMES[which], n_lanes,
                 base_name(file), line);
        }
    } else if (which >= SHUFFLE && which <= SHUFFLE_DOWN) {
        const int width = lane->width;
        if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
            fail("%s: width %d is not a power of two up to 32 (%s:%d)", NAMES[which], width,
                 base_name(file), line);
        }
    }
    if ((mask >> (own->id & 31u) & 1u) == 0) {
        fail("%s: mask 0x%08x leaves out the lane that calls, %u (%s:%d)", NAMES[which], mask,
             own->id & 31u, base_name(file), line);
    }
    /* A full mask stands for the lanes that a short last warp has. */
    return mask == 0xFFFFFFFFu && n_lanes < 32 ? (1u << n_lanes) - 1 : mask;
}

void
warp(function which, unsigned mask, exchange *own_lane, const char *file, int line)
{
    launch_state *launch = current_launch;
    mask = check_mask(launch, which, mask, own_lane, file, line);
    thread *own = launch->running;
    const unsigned first = own->id & ~31u, own_bit = 1u << (own->id & 31u);
    if (mask & launch->absent[first / 32]) {
        fail("%s: mask 0x%08x names lane %d, which has returned or never was (%s:%d)", NAMES[which],
             mask, __builtin_ctz(mask & launch->absent[first / 32]), base_name(file), line);
    }
    if (mask & ~(launch->waiting[first / 32] | own_bit)) {
        own->lane = own_lane;
        wait(launch, WAITS_FOR_WARP, which, mask, file, line);
        return;
    }
    thread *lanes = launch->threads + first;
    warp_lanes w = {};
    w.mask = mask;
    for (unsigned i = 0; i < 32; i++) {
        if ((mask >> i & 1u) == 0) {
            continue;
        }
        thread *other = lanes + i;
        const int is_here = other == own || (other->at == which && other->mask == mask);
        if (!is_here) {
            own->lane = own_lane;
            wait(launch, WAITS_FOR_WARP, which, mask, file, line);
            return;
        }
        w.lane[i] = other == own ? own_lane : other->lane;
        w.n_lanes++;
    }
    launch->waiting[first / 32] &= ~mask;
    complete(launch, w, which, own->id / 32);
    for (unsigned i = 0; i < 32; i++) {
        if (mask >> i & 1u) {
            lanes[i].state = READY;
        }
    }
}

/* ---- the scheduler ---- */

static void
enter_thread()
{
    launch_state *launch = current_launch;
    launch->call(reinterpret_cast<void *>(launch->parameters));
    check_copies_landed(launch->running);
    launch->running->state = RETURNED;
    launch->absent[launch->running->id / 32] |= 1u << (launch->running->id & 31u);
    bd_gpu_switch(&launch->running->state_of_cpu, &launch->scheduler);
}

static int
describe(const thread *other, char *out, size_t n_bytes)
{
    const dim3 &i = other->index;
    if (other->state == RETURNED) {
        return snprintf(out, n_bytes, "thread (%u, %u, %u) has returned", i.x, i.y, i.z);
    }
    if (other->state == WAITS_FOR_BLOCK) {
        return snprintf(out, n_bytes, "thread (%u, %u, %u) waits at __syncthreads (%s:%d)", i.x,
                        i.y, i.z, base_name(other->file), other->line);
    }
    return snprintf(out, n_bytes, "thread (%u, %u, %u) waits at %s for lanes 0x%08x (%s:%d)", i.x,
                    i.y, i.z, NAMES[other->at], other->mask, base_name(other->file), other->line);
}

/* Nobody can go on: names one that waits and one that it may be waiting for. */
static void
report_deadlock(launch_state *launch)
{
    const thread *waits = nullptr, *other = nullptr;
    for (unsigned i = 0; i < launch->n_threads; i++) {
        const thread *each = launch->threads + i;
        if (waits == nullptr && each->state != RETURNED) {
            waits = each;
        }
    }
    for (unsigned i = 0; i < launch->n_threads; i++) {
        const thread *each = launch->threads + i;
        const int differs =
            each->state != waits->state || each->at != waits->at || each->mask != waits->mask;
        const int is_awaited =
            waits->state == WAITS_FOR_BLOCK ||
            (each->id / 32 == waits->id / 32 && (waits->mask >> each->id % 32 & 1u));
        if (other == nullptr && differs && is_awaited) {
            other = each;
        }
    }
    char first[160], second[160] = "";
    (void)describe(waits, first, sizeof first);
    if (other != nullptr) {
        (void)describe(other, second, sizeof second);
    }
    launch->running = nullptr;
    fail("divergence: %s, %s", first, second);
}

static int
is_descending()
{
    const char *order = getenv("BITDELTA_EMULATION_ORDER");
    return order != nullptr && strcmp(order, "descending") == 0;
}

static void
run_block(launch_state *launch, int descending)
{
    launch->n_at_barrier = 0;
    for (unsigned warp = 0; warp < BD_MAX_THREADS / 32; warp++) {
        const unsigned n_lanes =
            32 * warp < launch->n_threads ? min(32u, launch->n_threads - 32 * warp) : 0;
        launch->absent[warp] = n_lanes == 32 ? 0 : ~0u << n_lanes;
        launch->waiting[warp] = 0;
    }
    start_block(launch);
    for (unsigned i = 0; i < launch->n_threads; i++) {
        thread *own = launch->threads + i;
        own->state = READY;
        own->n_groups = 0;
        own->n_copies = own->has_fenced = own->has_seen = 0;
        /* Tops that differ modulo a page, so that stacks do not share the same lines of the cache. */
        make_context(&own->state_of_cpu, own->stack, BD_STACK_BYTES - i % 16 * 256, enter_thread);
    }
    unsigned n_left = launch->n_threads;
    while (n_left > 0) {
        int has_moved = 0;
        for (unsigned i = 0; i < launch->n_threads; i++) {
            thread *own = launch->threads + (descending ? launch->n_threads - 1 - i : i);
            if (own->state != READY) {
                continue;
            }
            has_moved = 1;
            launch->running = own;
            bd_gpu_switch(&launch->scheduler, &own->state_of_cpu);
            if (launch->has_failed) {
                return;
            }
            n_left -= own->state == RETURNED;
        }
        if (!has_moved) {
            report_deadlock(launch);
            return;
        }
    }
}

static void
run_blocks(launch_state *launch)
{
    const dim3 grid = launch->shape.grid;
    const int descending = is_descending();
    for (uint64_t i = 0; i < launch->n_blocks && !launch->has_failed; i++) {
        const uint64_t at = descending ? launch->n_blocks - 1 - i : i;
        launch->block =
            dim3(static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                 static_cast<unsigned>(at / grid.x / grid.y));
        run_block(launch, descending);
    }
}

/* NULL, or why CUDA would refuse the configuration too. */
static const char *
misshape(const launch_shape &shape)
{
    const dim3 &g = shape.grid, &b = shape.block;
    if (g.x == 0 || g.y == 0 || g.z == 0 || b.x == 0 || b.y == 0 || b.z == 0) {
        return "a grid or block of nothing";
    }
    if (g.x > 0x7FFFFFFFu || g.y > 65535 || g.z > 65535) {
        return "a grid beyond 2147483647 x 65535 x 65535 blocks";
    }
    if (uint64_t{g.x} * g.y * g.z > BD_MAX_BLOCKS) {
        return "more blocks than the emulation has patience for";
    }
    if (b.x > 1024 || b.y > 1024 || b.z > 64 || uint64_t{b.x} * b.y * b.z > BD_MAX_THREADS) {
        return "a block of more than 1024 threads";
    }
    return shape.shared_bytes > BD_MAX_SHARED ? "more than 99 KB of shared memory" : nullptr;
}

static void
place_threads(launch_state *launch)
{
    const dim3 block = launch->shape.block;
    for (unsigned i = 0; i < launch->n_threads; i++) {
        thread *own = launch->threads + i;
        own->id = i;
        own->index = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
        own->copies = launch->copies + size_t{i} * BD_MAX_COPIES;
        own->stack = launch->stacks + (i + 1) * BD_STACK_BYTES; /* the first is what may overflow */
    }
}

bd_status
run(const launch_shape &shape, void (*call)(void *), void *parameters, size_t n_bytes)
{
    if (current_launch != nullptr) {
        fail("%s: a launch within a kernel", shape.name);
        return BD_ERR_CUDA;
    }
    if (failed_outside) {
        failed_outside = 0;
        return BD_ERR_CUDA;
    }
    const char *wrong = misshape(shape);
    if (wrong != nullptr) {
        (void)snprintf(message, sizeof message, "kernel %s: invalid configuration: %s", shape.name,
                       wrong);
        return BD_ERR_CUDA;
    }
    launch_state launch = {};
    launch.shape = shape;
    launch.call = call;
    launch.parameters = reinterpret_cast<uintptr_t>(parameters);
    launch.parameters_end = launch.parameters + n_bytes;
    launch.n_blocks = uint64_t{shape.grid.x} * shape.grid.y * shape.grid.z;
    launch.n_threads = shape.block.x * shape.block.y * shape.block.z;
    const size_t stack_bytes = (launch.n_threads + 1) * BD_STACK_BYTES;
    void *stacks =
        mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    launch.stacks = stacks == MAP_FAILED ? nullptr : static_cast<char *>(stacks);
    launch.threads = static_cast<thread *>(calloc(launch.n_threads, sizeof(thread)));
    launch.copies = static_cast<copy *>(calloc(launch.n_threads, BD_MAX_COPIES * sizeof(copy)));
    bd_status status = BD_ERR_MEMORY;
    if (launch.stacks != nullptr && launch.threads != nullptr && launch.copies != nullptr &&
        start_memory(&launch) == BD_OK) {
        place_threads(&launch);
        const bd_float_state state = bd_set_float_state();
        current_launch = &launch;
        run_blocks(&launch);
        current_launch = nullptr;
        bd_restore_float_state(state);
        status = launch.has_failed ? BD_ERR_CUDA : BD_OK;
    }
    end_memory(&launch);
    free(launch.threads);
    free(launch.copies);
    if (launch.stacks != nullptr) {
        (void)munmap(launch.stacks, stack_bytes);
    }
    return status;
}

} /* namespace bd_gpu */

/* ---- cuda_device.h ---- */

const char *
bd_gpu_missing(void)
{
    return nullptr;
}

const char *
bd_gpu_message(void)
{
    return bd_gpu::message;
}

/* BITDELTA_EMULATION_CAPABILITY=100: as on GPUs without b1 products. */
bd_status
bd_gpu_enter(int device, int *before, int *capability, int *n_processors)
{
    (void)device;
    const char *text = getenv("BITDELTA_EMULATION_CAPABILITY");
    *before = 0;
    *capability = text == nullptr ? 80 : atoi(text);
    *n_processors = 2;
    return BD_OK;
}

void
bd_gpu_leave(int before)
{
    (void)before;
}

bd_status
bd_gpu_put(void *to, const void *from, size_t n_bytes, void *stream)
{
    (void)stream;
    memcpy(to, from, n_bytes);
    return BD_OK;
}

/* BITDELTA_EMULATION_CAPTURE=1: as during the capture of a CUDA graph. */
int
bd_gpu_is_captured(void *stream)
{
    (void)stream;
    return getenv("BITDELTA_EMULATION_CAPTURE") != nullptr;
}

int
bd_gpu_is_emulated(void)
{
    return 1;
}
