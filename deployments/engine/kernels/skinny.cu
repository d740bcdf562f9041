// A few rows of 16-bit activations times a tiled 4-bit or 8-bit weight: out = x W^T + bias.
//
// Compiled at run time with these macros:
//   BITS      4 or 8
//   GROUPS    groups of 8 rows of x that one launch computes (1, 2, 4 or 8)
//   STRIPS    16-row strips of the weight that a warp computes at once
//   DEPTH     64-column blocks of each strip that a warp reads a step ahead
//   ACROSS    warps of a block side by side over strips
//   ALONG     warps of a block along the columns
//   CLUSTER   blocks along the columns; they sum through each other's shared memory
//   PARTS     1, 2 or 4 parts of x that are waited for one after the other
//   HALF      1: float16, 0: bfloat16
//   ROUNDED   1: 4-bit weights are scaled before the product, in 16 bits; 0: float32 sums of 64 columns after it
//   PER_SCALE 64-column blocks that share a 4-bit scale: blocksize / 64
//   NESTED    1: 4-bit scales are double-quantised
//
// A warp takes its tiles of 16 rows by 64 columns (see repack.py) from memory to registers, a step ahead of their use;
// the block's columns of x lie in shared memory. 4-bit pairs come from a table of all 256 in shared memory, a copy for each
// lane at its own bank. The instruction is mma.m16n8k16: 16 rows of the weight, 8 of x. Sums of a row of x do not depend
// on the other rows, and their order depends on ALONG and CLUSTER alone: the same call gives the same bits.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

#define WARPS (ACROSS * ALONG)
#define THREADS (32 * WARPS)
#define BLOCK_STRIPS (STRIPS * ACROSS)
#define BLOCK_ROWS (16 * BLOCK_STRIPS)
#define SUM_STRIDE (BLOCK_ROWS + 4)  // floats; the four columns that a warp writes at once fall on different banks
#define TABLE_BYTES (BITS == 4 ? 32768 : 0)
#define SCALE_AFTER (BITS == 4 && !ROUNDED)
#define STEP (ALONG * DEPTH)  // 64-column blocks that a block computes between two looks at what has arrived
#if HALF
#define TYPE "f16"
#else
#define TYPE "bf16"
#endif

__device__ __forceinline__ u32 pack(float low, float high) {
    u32 pair;
    asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ u16 narrow(float value) {
    u16 bits;
    asm("cvt.rn." TYPE ".f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ float widen(u16 bits) {
#if HALF
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#else
    return __uint_as_float((u32)bits << 16);
#endif
}

__device__ __forceinline__ void multiply(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Predicated, as a branch around each load would keep the compiler from moving others across it.
__device__ __forceinline__ void read(uint4& words, const u8* at, bool live) {
    asm volatile("{.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n"
                 "@p ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];}"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w) : "l"(at), "r"((int)live));
}

__device__ __forceinline__ float read(const float* at, bool live) {
    float value;
    asm volatile("{.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p ld.global.nc.f32 %0, [%1];}"
                 : "=f"(value) : "l"(at), "r"((int)live));
    return value;
}

__device__ __forceinline__ void load_matrices(u32 (&b)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(at));
}

// Until at most `pending` groups of copies are on their way.
__device__ __forceinline__ void wait_for_copies(int pending) {
    if (pending == 0) asm volatile("cp.async.wait_group 0;" ::: "memory");
    if (pending == 1) asm volatile("cp.async.wait_group 1;" ::: "memory");
    if (pending == 2) asm volatile("cp.async.wait_group 2;" ::: "memory");
    if (pending == 3) asm volatile("cp.async.wait_group 3;" ::: "memory");
}

__device__ __forceinline__ u32 cluster_rank() {
    u32 rank = 0;
#if CLUSTER > 1
    asm("mov.u32 %0, %cluster_ctarank;" : "=r"(rank));
#endif
    return rank;
}

__device__ __forceinline__ void cluster_barrier() {
#if CLUSTER > 1
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}

__device__ __forceinline__ float of_rank(u32 at, u32 rank) {
    float value;
#if CLUSTER > 1
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(there));
#else
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(at));
#endif
    return value;
}

// What a warp holds of one tile until it is computed.
struct Tile {
    uint4 words[BITS == 4 ? 1 : 2];
    float scale[2];  // of rows lane / 4 and 8 + lane / 4, 4 bits only
};

struct Weight {
    const u8* tiles;
    const void* absmax;          // 4 bits: float, or u8 where nested, [k / blocksize, n]; 8 bits: float [n]
    const float* nested_absmax;  // [blocks / 256]
    const float* nested_code;    // [256]
    const float* offset;         // [1]
    u32 n, columns;              // columns: k / 64
};

// Of row `row + below` in one block column; `below` is known when this is compiled, so that addresses are shared.
__device__ __forceinline__ float scale_of(const Weight& w, u32 row, int below, u32 column, bool live) {
    const u32 block = column / PER_SCALE;
    const size_t at = block * w.n + row;
#if NESTED
    if (!live) return 0;
    const u8 code = __ldg((const u8*)w.absmax + at + below);
    const float outer = __ldg(w.nested_absmax + ((row + below) * (w.columns / PER_SCALE) + block) / 256);
    return __fmaf_rn(__ldg(w.nested_code + code), outer, __ldg(w.offset));
#else
    return read((const float*)w.absmax + at + below, live);
#endif
}

#define TILE_BYTES (BITS * 128)

// The lane's part of the tile that begins `at` bytes after the first; a weight has less than 4 GiB.
__device__ __forceinline__ void load(
    Tile& tile, const Weight& w, u32 at, u32 row, int below, u32 column, bool live) {
#pragma unroll
    for (int part = 0; part < BITS / 4; ++part) read(tile.words[part], w.tiles + at + part * 512, live);
#if BITS == 4
    tile.scale[0] = scale_of(w, row, below, column, live);
    tile.scale[1] = scale_of(w, row, below + 8, column, live);
#endif
}

#if BITS == 4
// Entry b of the table, 32 words for 32 lanes: the weights of byte b, that of the even column in the low half.
__device__ __forceinline__ void fill_table(u8* table, const float* code, int thread) {
    const float mine = __ldg(code + thread % 16);
#pragma unroll 4
    for (int at = thread; at < 2048; at += THREADS) {
        const u32 pair = pack(__shfl_sync(~0u, mine, at >> 7), __shfl_sync(~0u, mine, at >> 3 & 15));
        ((uint4*)table)[at] = make_uint4(pair, pair, pair, pair);
    }
}

// The table begins at a multiple of its size: an address is put together by one instruction. `mine`: the table's address
// and the lane's bank.
__device__ __forceinline__ u32 look_up(u32 word, int byte, u32 mine) {
    const u32 shifted = byte == 0 ? word << 7 : word >> (8 * byte - 7);
    u32 pair;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(shifted & 0x7F80u | mine));
    return pair;
}

__device__ __forceinline__ u32 scaled(u32 pair, u32 scale) {
    u32 product;
    asm("mul.rn." TYPE "x2 %0, %1, %2;" : "=r"(product) : "r"(pair), "r"(scale));
    return product;
}

// 32 columns, of the first or the second half of a tile.
__device__ __forceinline__ void compute(
    float (*sum)[4], const Tile& tile, int half, const u32 (*b)[4], u32 mine) {
    const u32 top = half ? tile.words[0].y : tile.words[0].x, bottom = half ? tile.words[0].w : tile.words[0].z;
#if ROUNDED
    const u32 top_scale = pack(tile.scale[0], tile.scale[0]), bottom_scale = pack(tile.scale[1], tile.scale[1]);
#endif
#pragma unroll
    for (int chunk = 0; chunk < 2; ++chunk) {  // 16 columns each
        u32 a[4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            a[2 * i] = look_up(top, 2 * chunk + i, mine);
            a[2 * i + 1] = look_up(bottom, 2 * chunk + i, mine);
#if ROUNDED
            a[2 * i] = scaled(a[2 * i], top_scale);
            a[2 * i + 1] = scaled(a[2 * i + 1], bottom_scale);
#endif
        }
#pragma unroll
        for (int group = 0; group < GROUPS; ++group)
            multiply(sum[group], a[0], a[1], a[2], a[3], b[group][2 * chunk], b[group][2 * chunk + 1]);
    }
}
#else
// Bytes 0 and 2, and bytes 1 and 3, of four int8 values as pairs of 16-bit numbers. In bfloat16 v is (128 + (v & 127))
// - (128 + (v & 128)), in float16 1024 + (v + 128) has the bits 0x6400 | (v ^ 128).
__device__ __forceinline__ u32 widen_pair(u32 word) {
    u32 pair;
#if HALF
    asm("{.reg .b32 biased;\nlop3.b32 biased, %1, 0x00FF00FF, 0x64806480, 0x6A;\nadd.rn.f16x2 %0, biased, %2;}"
        : "=r"(pair) : "r"(word), "r"(0xE480E480u));
#else
    asm("{.reg .b32 low, sign;\nlop3.b32 low, %1, 0x007F007F, 0x43004300, 0xEA;\n"
        "lop3.b32 sign, %1, 0x00800080, 0xC300C300, 0xEA;\nfma.rn.bf16x2 %0, low, %2, sign;}"
        : "=r"(pair) : "r"(word), "r"(0x3F803F80u));
#endif
    return pair;
}

__device__ __forceinline__ void compute(
    float (*sum)[4], const Tile& tile, int half, const u32 (*b)[4], u32) {
    const uint4& words = tile.words[half];
#pragma unroll
    for (int chunk = 0; chunk < 2; ++chunk) {
        const u32 top = chunk ? words.y : words.x, bottom = chunk ? words.w : words.z;
        const u32 a0 = widen_pair(top), a1 = widen_pair(bottom), a2 = widen_pair(top >> 8), a3 = widen_pair(bottom >> 8);
#pragma unroll
        for (int group = 0; group < GROUPS; ++group)
            multiply(sum[group], a0, a1, a2, a3, b[group][2 * chunk], b[group][2 * chunk + 1]);
    }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS) skinny(
    const u16* __restrict__ x, const u8* __restrict__ tiles, const void* __restrict__ absmax,
    const float* __restrict__ nested_absmax, const float* __restrict__ nested_code, const float* __restrict__ offset,
    const float* __restrict__ code, const u16* __restrict__ bias, u16* __restrict__ out,
    int rows, int n, int columns, int stride, int x_stride /* bytes of a row of x in shared memory */) {
    extern __shared__ __align__(1024) u8 shared[];
    const int thread = threadIdx.x, lane = thread % 32, across = thread / 32 / ALONG, along = thread / 32 % ALONG;
    const u32 rank = cluster_rank();
    const Weight weight = {tiles, absmax, nested_absmax, nested_code, offset, (u32)n, (u32)columns};
    // The last block starts earlier rather than end late: some rows are computed twice, to the same bits.
    const int block_strip = min(blockIdx.x / CLUSTER * BLOCK_STRIPS, n / 16 - BLOCK_STRIPS);
    const int first_strip = block_strip + across * STRIPS, begin = rank * columns / CLUSTER;
    const int end = (rank + 1) * columns / CLUSTER, steps = (end - begin + STEP - 1) / STEP;
    const u32 row = first_strip * 16 + lane / 4, base = (u32)__cvta_generic_to_shared(shared);
    const u32 table = BITS == 4 ? (TABLE_BYTES - base % 32768) % 32768 : 0;  // where it begins

#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
    // Weights do not depend on the kernel before this one.
    Tile tile[DEPTH][STRIPS];
    const u32 strip_bytes = columns * TILE_BYTES, first = first_strip * strip_bytes + lane * 16;
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
        const int column = begin + d * ALONG + along;
#pragma unroll
        for (int i = 0; i < STRIPS; ++i)
            load(tile[d][i], weight, first + i * strip_bytes + column * TILE_BYTES, row, i * 16, column, column < end);
    }
#if BITS == 4
    fill_table(shared + table, code, thread);
#endif
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    const u32 activations = base + table + TABLE_BYTES, mine = base + table + lane * 4;
    const int part_steps = (steps + PARTS - 1) / PARTS, part_chunks = part_steps * (STEP * 8);  // of 16 bytes
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        const int first_chunk = part * part_chunks, chunks = min(part_chunks, (end - begin) * 8 - first_chunk);
        for (int i = thread; i < rows * chunks; i += THREADS) {
            const int m = i / chunks, chunk = first_chunk + i % chunks;
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(activations + m * x_stride + chunk * 16),
                         "l"(x + (size_t)m * stride + begin * 64 + chunk * 8));
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    }

    const u32 matrices = activations + lane % 8 * x_stride + lane / 8 * 16;
    float sum[STRIPS][GROUPS][4] = {};
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        if (PARTS == 1 ? step == 0 : step % part_steps == 0) {
            wait_for_copies(PARTS - 1 - step / part_steps);
            __syncthreads();
        }
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {
            const int column = begin + step * STEP + d * ALONG + along;
            if (column >= end) break;
            const int next = column + STEP;
            const u32 matrix = matrices + (column - begin) * 128;
            const u32 at = first + next * TILE_BYTES;
#if GROUPS <= 2
            u32 b[2][GROUPS][4];
#pragma unroll
            for (int i = 0; i < 2 * GROUPS; ++i)
                load_matrices(b[i / GROUPS][i % GROUPS], matrix + i % GROUPS * 8 * x_stride + i / GROUPS * 64);
#pragma unroll
            for (int i = 0; i < STRIPS; ++i) {
                const Tile now = tile[d][i];
                load(tile[d][i], weight, at + i * strip_bytes, row, i * 16, next, next < end);
#if SCALE_AFTER
                float part[GROUPS][4] = {};
                compute(part, now, 0, b[0], mine);
                compute(part, now, 1, b[1], mine);
#pragma unroll
                for (int j = 0; j < 4 * GROUPS; ++j)
                    sum[i][j / 4][j % 4] = __fmaf_rn(part[j / 4][j % 4], now.scale[j % 4 / 2], sum[i][j / 4][j % 4]);
#else
                compute(sum[i], now, 0, b[0], mine);
                compute(sum[i], now, 1, b[1], mine);
#endif
            }
#else  // half of x at a time, and a tile is replaced when it is done: registers are short
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                u32 b[GROUPS][4];
#pragma unroll
                for (int group = 0; group < GROUPS; ++group)
                    load_matrices(b[group], matrix + group * 8 * x_stride + half * 64);
#pragma unroll
                for (int i = 0; i < STRIPS; ++i) {
                    compute(sum[i], tile[d][i], half, b, mine);
                    if (half) load(tile[d][i], weight, at + i * strip_bytes, row, i * 16, next, next < end);
                }
            }
#endif
        }
    }

    // [ALONG][rows of x][rows of the weight], over what is not needed any more.
    float* sums = (float*)shared;
    wait_for_copies(0);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < STRIPS; ++i)
#pragma unroll
        for (int group = 0; group < GROUPS; ++group)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int m = group * 8 + lane % 4 * 2 + j % 2;
                const int local = (across * STRIPS + i) * 16 + lane / 4 + j / 2 * 8;
                sums[(along * GROUPS * 8 + m) * SUM_STRIDE + local] = sum[i][group][j];
            }
    __syncthreads();
    if (ALONG > 1) {
        for (int i = thread; i < rows * BLOCK_ROWS; i += THREADS) {
            float* at = sums + i / BLOCK_ROWS * SUM_STRIDE + i % BLOCK_ROWS;
            float total = at[0];
#pragma unroll
            for (int part = 1; part < ALONG; ++part) total += at[part * GROUPS * 8 * SUM_STRIDE];
            at[0] = total;
        }
    }
    cluster_barrier();
    const int share = BLOCK_ROWS / CLUSTER;  // rows of the weight that this block writes
    for (int i = thread; i < rows * share; i += THREADS) {
        const int m = i / share, local = rank * share + i % share, to = block_strip * 16 + local;
        float total = 0;
#pragma unroll
        for (int other = 0; other < CLUSTER; ++other) total += of_rank(base + (m * SUM_STRIDE + local) * 4, other);
#if BITS == 8
        total *= __ldg((const float*)absmax + to) / 127.0f;
#endif
        if (bias != nullptr) total += widen(bias[to]);
        out[(size_t)m * n + to] = narrow(total);
    }
#if CLUSTER > 1
    cluster_barrier();  // nobody leaves while its sums are read
#endif
}
