/* emulation_memory.cpp - every load and store of a kernel: may it, and does the order of the threads allow it?
 *
 * Under -fsanitize=thread the compiler calls a function before each access that is not surely to a local
 * variable. ThreadSanitizer's library defines those; here they are ours, and the rules are a GPU's. */
#include "emulation_launch.h"

#include <pthread.h>
#include <stdlib.h>

namespace bd_gpu
{

enum access { READ, WRITE, ATOMIC };

static const uint64_t IN_FLIGHT =
    (uint64_t{1} << 26) - 1; /* block time of a byte that is being copied to */

/* ---- the order of accesses ---- */

static int
is_never(const stamp &s)
{
    return s.block_time == 0;
}

static stamp
now(const launch_state *launch)
{
    const unsigned id = launch->running->id;
    stamp s = {};
    s.block_time = launch->block_time & 0x3FFFFFFu;
    s.warp_time = launch->warp_time[id / 32] & 0x3FFFFFFu;
    s.thread = id & 1023u;
    return s;
}

/* Did an earlier block publish what it wrote at `time`, and has this one looked? */
static int
is_published(const launch_state *launch, uint64_t time)
{
    uint64_t low = 0, high = launch->n_begun;
    while (high - low > 1) {
        const uint64_t middle = (low + high) / 2;
        *(launch->blocks[middle].began <= time ? &low : &high) = middle;
    }
    return launch->has_acquired && launch->blocks[low].has_published;
}

/* Does everything that `before` stands for happen before what the running thread does now? */
static int
is_ordered(const launch_state *launch, const stamp &before)
{
    if (is_never(before)) {
        return 1;
    }
    const uint64_t began = launch->blocks[launch->n_begun - 1].began;
    if (before.block_time < began) {
        return is_published(launch, before.block_time);
    }
    const unsigned id = launch->running->id;
    if (before.block_time < launch->block_time ||
        (before.thread == id && !before.by_lanes && !before.by_warps)) {
        return 1;
    }
    return !before.by_warps && before.thread / 32 == id / 32 &&
           before.warp_time < launch->warp_time[id / 32];
}

/* The stamp that stands for the reads so far and one more. */
static stamp
join_reads(const stamp &before, const stamp &read)
{
    stamp joined = read;
    if (before.block_time != read.block_time || before.by_warps) {
        joined.by_warps = before.block_time == read.block_time && before.by_warps;
    } else if (before.thread / 32 != read.thread / 32) {
        joined.by_warps = 1;
    } else if (before.warp_time == read.warp_time) {
        joined.by_lanes = before.by_lanes || before.thread != read.thread;
    }
    return joined;
}

static void
fail_by_order(const launch_state *launch, access kind, const stamp &before, const char *did,
              const char *where, uint64_t offset)
{
    static const char *const DOES[] = {"reads", "writes", "updates"};
    const uint64_t began = launch->blocks[launch->n_begun - 1].began;
    if (before.block_time < began) {
        fail(
            "race: it %s byte %llu of %s, which another block %s, without fences and atomics "
            "between",
            DOES[kind], static_cast<unsigned long long>(offset), where, did);
    }
    const dim3 i = launch->threads[before.thread].index;
    fail("race: it %s byte %llu of %s, which thread (%u, %u, %u) %s, without a barrier between",
         DOES[kind], static_cast<unsigned long long>(offset), where, i.x, i.y, i.z, did);
}

/* One access to n bytes whose cells these are. */
static void
check_order(launch_state *launch, cell *cells, size_t n, access kind, const char *where,
            uint64_t offset)
{
    const stamp mine = now(launch);
    for (size_t i = 0; i < n; i++) {
        cell &c = cells[i];
        const int are_atomic = kind == ATOMIC && c.written.by_warps;
        if (!are_atomic && !is_ordered(launch, c.written)) {
            fail_by_order(launch, kind, c.written, "wrote", where, offset + i);
        }
        if (kind == READ) {
            c.read = join_reads(c.read, mine);
            continue;
        }
        if (!is_ordered(launch, c.read)) {
            fail_by_order(launch, kind, c.read, "read", where, offset + i);
        }
        /* An atomic does not hide the plain write of the same thread before it. */
        const int was_plain = !c.written.by_warps && c.written.thread == mine.thread &&
                              c.written.block_time == mine.block_time &&
                              c.written.warp_time == mine.warp_time;
        c.written = mine;
        c.written.by_warps = kind == ATOMIC && !was_plain;
    }
}

/* ---- shared memory ---- */

static void
shared_access(launch_state *launch, uintptr_t address, size_t n, access kind)
{
    const uintptr_t offset = address - reinterpret_cast<uintptr_t>(launch->shared);
    const size_t n_bytes = launch->shape.shared_bytes;
    if (offset + n > n_bytes) {
        fail("out of bounds: %zu bytes at byte %llu of shared memory, which has %zu", n,
             static_cast<unsigned long long>(offset), n_bytes);
    }
    for (size_t i = 0; i < n; i++) {
        const stamp written = launch->shared_cells[offset + i].written;
        if (written.block_time == IN_FLIGHT) {
            fail(
                "unwaited copy: byte %llu of shared memory awaits an asynchronous copy of thread "
                "%u",
                static_cast<unsigned long long>(offset + i), static_cast<unsigned>(written.thread));
        }
        if (kind != WRITE && is_never(written)) {
            fail("uninitialised: byte %llu of shared memory has not been written by this block",
                 static_cast<unsigned long long>(offset + i));
        }
    }
    check_order(launch, launch->shared_cells + offset, n, kind, "shared memory", offset);
}

void *
shared_memory()
{
    return current()->shared;
}

/* ---- global memory ---- */

/* What was lent, by begin; process-wide, as a GPU's allocations are. */
struct loan {
    uintptr_t begin, end;
    int is_writable;
};
static pthread_mutex_t loans_lock = PTHREAD_MUTEX_INITIALIZER;
static loan *loans;
static size_t n_loans, loans_capacity;

static buffer *
find_buffer(launch_state *launch, uintptr_t address)
{
    buffer *latest = launch->buffers + launch->latest_buffer;
    if (launch->n_buffers > 0 && address >= latest->begin && address < latest->end) {
        return latest;
    }
    for (size_t i = 0; i < launch->n_buffers; i++) {
        if (address >= launch->buffers[i].begin && address < launch->buffers[i].end) {
            launch->latest_buffer = i;
            return launch->buffers + i;
        }
    }
    return nullptr;
}

/* Names the nearest buffer, if one is near. */
static void
fail_out_of_bounds(const launch_state *launch, uintptr_t address, size_t n, access kind)
{
    const char *does = kind == READ ? "reads" : "writes";
    const buffer *nearest = nullptr;
    uintptr_t least = 4096;
    for (size_t i = 0; i < launch->n_buffers; i++) {
        const buffer *each = launch->buffers + i;
        const uintptr_t beyond = address < each->begin ? each->begin - address
                                 : address < each->end ? 0
                                                       : address - each->end;
        if (beyond < least) {
            nearest = each;
            least = beyond;
        }
    }
    if (nearest == nullptr) {
        fail("out of bounds: it %s %zu bytes of memory that is not the GPU's", does, n);
    }
    fail("out of bounds: it %s %zu bytes at byte %lld of a global buffer of %zu", does, n,
         static_cast<long long>(address - nearest->begin),
         static_cast<size_t>(nearest->end - nearest->begin));
}

#if defined(__ELF__)
extern "C" const char __ehdr_start[] __attribute__((visibility("hidden")));
extern "C" const char _end[] __attribute__((visibility("hidden")));
#endif

/* Tables and parameters. */
static int
is_constant(const launch_state *launch, uintptr_t address)
{
    int is_own = address >= launch->parameters && address < launch->parameters_end;
#if defined(__ELF__)
    is_own = is_own || (address >= reinterpret_cast<uintptr_t>(__ehdr_start) &&
                        address < reinterpret_cast<uintptr_t>(_end));
#endif
    return is_own;
}

static void
global_access(launch_state *launch, uintptr_t address, size_t n, access kind)
{
    buffer *found = find_buffer(launch, address);
    if (found == nullptr) {
        if (kind != READ || !is_constant(launch, address)) {
            fail_out_of_bounds(launch, address, n, kind);
        }
        return;
    }
    if (address + n > found->end) {
        fail_out_of_bounds(launch, address, n, kind);
    }
    if (kind != READ && !found->is_writable) {
        fail("it writes %zu bytes at byte %llu of a global buffer that is an input", n,
             static_cast<unsigned long long>(address - found->begin));
    }
    thread *own = launch->running;
    if (kind == WRITE) {
        own->has_fenced = 0;
    } else if (kind == ATOMIC) {
        launch->blocks[launch->n_begun - 1].has_published |= own->has_fenced;
        own->has_seen = 1;
    }
    if (found->is_writable) {
        check_order(launch, found->cells + (address - found->begin), n, kind, "a global buffer",
                    address - found->begin);
    }
}

void
fence()
{
    thread *own = current()->running;
    own->has_fenced = 1;
    current()->has_acquired |= own->has_seen;
}

/* ---- both ---- */

static inline void
access_memory(uintptr_t address, size_t n, access kind)
{
    launch_state *launch = current();
    if (launch == nullptr) {
        return; /* a launcher, not a kernel */
    }
    const uintptr_t stack = reinterpret_cast<uintptr_t>(launch->running->stack);
    if (address - stack < BD_STACK_BYTES) {
        return;
    }
    if (address - reinterpret_cast<uintptr_t>(launch->shared) < 2 * BD_MAX_SHARED) {
        shared_access(launch, address, n, kind);
    } else {
        global_access(launch, address, n, kind);
    }
}

void
atomic_access(const void *address, size_t n_bytes)
{
    if (reinterpret_cast<uintptr_t>(address) % n_bytes != 0) {
        fail("misaligned: an atomic of %zu bytes", n_bytes);
    }
    access_memory(reinterpret_cast<uintptr_t>(address), n_bytes, ATOMIC);
}

static int
is_shared(const launch_state *launch, const void *address)
{
    return reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(launch->shared) <
           2 * BD_MAX_SHARED;
}

void
require_global(const void *address)
{
    if (is_shared(current(), address)) {
        fail("__ldg of shared memory");
    }
}

/* ---- asynchronous copies ---- */

void
copy_async(void *shared, const void *global, int n_bytes, const char *file, int line)
{
    launch_state *launch = current();
    thread *own = launch->running;
    const char *slash = strrchr(file, '/');
    const char *name = slash == nullptr ? file : slash + 1;
    const uintptr_t to = reinterpret_cast<uintptr_t>(shared),
                    from = reinterpret_cast<uintptr_t>(global);
    if (!is_shared(launch, shared) || is_shared(launch, global)) {
        fail("bd_copy_async16 copies global to shared memory (%s:%d)", name, line);
    }
    if (to % 16 != 0 || from % 16 != 0 || n_bytes < 0 || n_bytes > 16) {
        fail("bd_copy_async16: shared %% 16 = %d, global %% 16 = %d, %d bytes (%s:%d)",
             static_cast<int>(to % 16), static_cast<int>(from % 16), n_bytes, name, line);
    }
    if (own->n_copies == BD_MAX_COPIES) {
        fail("bd_copy_async16: more than %d copies not waited for (%s:%d)", BD_MAX_COPIES, name,
             line);
    }
    if (n_bytes > 0) {
        global_access(launch, from, static_cast<size_t>(n_bytes), READ);
    }
    shared_access(launch, to, 16, WRITE);
    memset(shared, 0xFF, 16);
    cell *cells = launch->shared_cells + (to - reinterpret_cast<uintptr_t>(launch->shared));
    for (int i = 0; i < 16; i++) {
        cells[i].written.block_time = IN_FLIGHT;
    }
    own->copies[own->n_copies++] = {shared, global, n_bytes, own->n_groups};
}

void
copy_async_commit()
{
    current()->running->n_groups++;
}

void
copy_async_wait(int n_groups)
{
    launch_state *launch = current();
    thread *own = launch->running;
    int n_kept = 0;
    for (int i = 0; i < own->n_copies; i++) {
        const copy each = own->copies[i];
        if (each.group + static_cast<unsigned>(n_groups) >= own->n_groups) {
            own->copies[n_kept++] = each;
            continue;
        }
        memset(each.shared, 0, 16);
        memcpy(each.shared, each.global, static_cast<size_t>(each.n_bytes));
        cell *cells =
            launch->shared_cells + (static_cast<unsigned char *>(each.shared) - launch->shared);
        for (int b = 0; b < 16; b++) {
            cells[b].written = now(launch);
        }
    }
    own->n_copies = n_kept;
}

void
check_copies_landed(thread *own)
{
    if (own->n_copies > 0) {
        fail("unwaited copy: it returns with %d asynchronous copies under way", own->n_copies);
    }
}

/* ---- the memory of a launch ---- */

static int
compare_loans(const void *a, const void *b)
{
    const loan *left = static_cast<const loan *>(a), *right = static_cast<const loan *>(b);
    return (left->begin > right->begin) - (left->begin < right->begin);
}

/* The loans as buffers; those that overlap are one, written to if any may be. */
static bd_status
take_loans(launch_state *launch)
{
    pthread_mutex_lock(&loans_lock);
    const size_t n = n_loans;
    loan *sorted = static_cast<loan *>(malloc((n + 1) * sizeof(loan)));
    if (sorted != nullptr && n > 0) {
        memcpy(sorted, loans, n * sizeof(loan));
    }
    pthread_mutex_unlock(&loans_lock);
    launch->buffers = static_cast<buffer *>(calloc(n + 1, sizeof(buffer)));
    if (sorted == nullptr || launch->buffers == nullptr) {
        free(sorted);
        return BD_ERR_MEMORY;
    }
    qsort(sorted, n, sizeof(loan), compare_loans);
    for (size_t i = 0; i < n; i++) {
        buffer *last = launch->buffers + launch->n_buffers;
        if (launch->n_buffers > 0 && sorted[i].begin < last[-1].end) {
            last[-1].end = max(last[-1].end, sorted[i].end);
            last[-1].is_writable |= sorted[i].is_writable;
        } else {
            *last = {sorted[i].begin, sorted[i].end, sorted[i].is_writable, nullptr};
            launch->n_buffers++;
        }
    }
    free(sorted);
    return BD_OK;
}

bd_status
start_memory(launch_state *launch)
{
    if (take_loans(launch) != BD_OK) {
        return BD_ERR_MEMORY;
    }
    for (size_t i = 0; i < launch->n_buffers; i++) {
        buffer *each = launch->buffers + i;
        if (each->is_writable) {
            each->cells = static_cast<cell *>(calloc(each->end - each->begin, sizeof(cell)));
            if (each->cells == nullptr) {
                return BD_ERR_MEMORY;
            }
        }
    }
    launch->blocks = static_cast<block_record *>(calloc(launch->n_blocks, sizeof(block_record)));
    launch->shared_cells =
        static_cast<cell *>(calloc(launch->shape.shared_bytes + 1, sizeof(cell)));
    void *shared =
        nullptr; /* what lies behind BD_MAX_SHARED is never touched: out of bounds is seen there */
    if (posix_memalign(&shared, 128, 2 * BD_MAX_SHARED) == 0) {
        launch->shared = static_cast<unsigned char *>(shared);
    }
    const int has_all =
        launch->blocks != nullptr && launch->shared_cells != nullptr && shared != nullptr;
    return has_all ? BD_OK : BD_ERR_MEMORY;
}

void
end_memory(launch_state *launch)
{
    for (size_t i = 0; launch->buffers != nullptr && i < launch->n_buffers; i++) {
        free(launch->buffers[i].cells);
    }
    free(launch->buffers);
    free(launch->blocks);
    free(launch->shared_cells);
    free(launch->shared);
}

void
start_block(launch_state *launch)
{
    pass_time(launch);
    launch->blocks[launch->n_begun++] = {launch->block_time, 0};
    launch->has_acquired = 0;
    memset(launch->shared, 0xFF, launch->shape.shared_bytes);
    memset(launch->shared_cells, 0, launch->shape.shared_bytes * sizeof(cell));
}

} /* namespace bd_gpu */

bd_status
bd_gpu_lend(const void *data, size_t n_bytes, int is_writable)
{
    using namespace bd_gpu;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
    bd_status status = BD_OK;
    if (n_bytes == 0) {
        return BD_OK;
    }
    pthread_mutex_lock(&loans_lock);
    if (n_loans == loans_capacity) {
        const size_t capacity = loans_capacity * 2 + 64;
        void *grown = realloc(loans, capacity * sizeof(loan));
        if (grown == nullptr) {
            status = BD_ERR_MEMORY;
        } else {
            loans = static_cast<loan *>(grown);
            loans_capacity = capacity;
        }
    }
    if (status == BD_OK) {
        loans[n_loans++] = {begin, begin + n_bytes, is_writable};
    }
    pthread_mutex_unlock(&loans_lock);
    return status;
}

void
bd_gpu_take_back(const void *data, size_t n_bytes, int is_writable)
{
    using namespace bd_gpu;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
    pthread_mutex_lock(&loans_lock);
    for (size_t i = n_loans; n_bytes > 0 && i-- > 0;) {
        if (loans[i].begin == begin && loans[i].end == begin + n_bytes &&
            loans[i].is_writable == is_writable) {
            loans[i] = loans[--n_loans];
            break;
        }
    }
    pthread_mutex_unlock(&loans_lock);
}

/* ---- what instrumented code calls ---- */

#define BD_READ(name, n)                                                              \
    extern "C" void name(void *address)                                               \
    {                                                                                 \
        bd_gpu::access_memory(reinterpret_cast<uintptr_t>(address), n, bd_gpu::READ); \
    }
#define BD_WRITE(name, n)                                                              \
    extern "C" void name(void *address)                                                \
    {                                                                                  \
        bd_gpu::access_memory(reinterpret_cast<uintptr_t>(address), n, bd_gpu::WRITE); \
    }
BD_READ(__tsan_read1, 1)
BD_READ(__tsan_read2, 2)
BD_READ(__tsan_read4, 4)
BD_READ(__tsan_read8, 8)
BD_READ(__tsan_read16, 16)
BD_READ(__tsan_unaligned_read2, 2)
BD_READ(__tsan_unaligned_read4, 4)
BD_READ(__tsan_unaligned_read8, 8)
BD_READ(__tsan_unaligned_read16, 16)
BD_WRITE(__tsan_write1, 1)
BD_WRITE(__tsan_write2, 2)
BD_WRITE(__tsan_write4, 4)
BD_WRITE(__tsan_write8, 8)
BD_WRITE(__tsan_write16, 16)
BD_WRITE(__tsan_unaligned_write2, 2)
BD_WRITE(__tsan_unaligned_write4, 4)
BD_WRITE(__tsan_unaligned_write8, 8)
BD_WRITE(__tsan_unaligned_write16, 16)

extern "C" void
__tsan_read_range(void *address, unsigned long n)
{
    bd_gpu::access_memory(reinterpret_cast<uintptr_t>(address), n, bd_gpu::READ);
}

extern "C" void
__tsan_write_range(void *address, unsigned long n)
{
    bd_gpu::access_memory(reinterpret_cast<uintptr_t>(address), n, bd_gpu::WRITE);
}

extern "C" void
__tsan_init()
{
}

/* Each function of a kernel: does the stack still suffice? */
extern "C" void
__tsan_func_entry(void *)
{
    bd_gpu::launch_state *launch = bd_gpu::current();
    char here = 0;
    if (launch != nullptr && &here - launch->running->stack < 8192) {
        bd_gpu::fail("its local variables take more than %zu bytes", BD_STACK_BYTES - 8192);
    }
}

extern "C" void
__tsan_func_exit()
{
}

/* UndefinedBehaviorSanitizer's, of which the first member of `data` is the place. */
namespace bd_gpu
{
struct source_location {
    const char *file;
    unsigned line, column;
};
static void
fail_at(const void *data, const char *what)
{
    const source_location *at = static_cast<const source_location *>(data);
    const char *slash = at->file == nullptr ? nullptr : strrchr(at->file, '/');
    fail("%s (%s:%u)", what, slash == nullptr ? (at->file == nullptr ? "?" : at->file) : slash + 1,
         at->line);
}
} /* namespace bd_gpu */

#define BD_UNDEFINED(name, what, ...)             \
    extern "C" void name(void *data, __VA_ARGS__) \
    {                                             \
        bd_gpu::fail_at(data, what);              \
    }
BD_UNDEFINED(__ubsan_handle_type_mismatch_v1, "misaligned: an address that its type does not allow",
             void *)
BD_UNDEFINED(__ubsan_handle_out_of_bounds, "out of bounds: an index beyond its array", void *)
BD_UNDEFINED(__ubsan_handle_shift_out_of_bounds, "a shift by the width or more", void *, void *)
BD_UNDEFINED(__ubsan_handle_add_overflow, "signed overflow of a sum", void *, void *)
BD_UNDEFINED(__ubsan_handle_sub_overflow, "signed overflow of a difference", void *, void *)
BD_UNDEFINED(__ubsan_handle_mul_overflow, "signed overflow of a product", void *, void *)
BD_UNDEFINED(__ubsan_handle_negate_overflow, "signed overflow of a negation", void *)
BD_UNDEFINED(__ubsan_handle_divrem_overflow, "division by zero, or an overflow of one", void *,
             void *)
BD_UNDEFINED(__ubsan_handle_float_cast_overflow, "a float beyond the integer it becomes", void *)
