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

#define BLOCK_STRIPS (STRIPS * ACROSS)
#define BLOCK_ROWS (16 * BLOCK_STRIPS)
#define SUM_STRIDE (BLOCK_ROWS + 4)  // floats; the four columns that a warp writes at once fall on different banks
#define SCALE_AFTER (BITS == 4 && !ROUNDED)
#define STEP (ALONG * DEPTH)  // 64-column blocks that a block computes between two looks at what has arrived

__device__ __forceinline__ void multiply(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void load_matrices(u32 (&b)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(at));
}

#if BITS == 4
// 32 columns, of the first or the second half of a tile.
__device__ __forceinline__ void compute(
    float (*sum)[4], const Tile& tile, const Weight& weight, float offset, int half, const u32 (*b)[4], u32 mine) {
    const u32 top = half ? tile.words[0].y : tile.words[0].x, bottom = half ? tile.words[0].w : tile.words[0].z;
#if ROUNDED
    const float first = scale_of(tile, 0, weight, offset), second = scale_of(tile, 1, weight, offset);
    const u32 top_scale = pack(first, first), bottom_scale = pack(second, second);
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
__device__ __forceinline__ void compute(
    float (*sum)[4], const Tile& tile, const Weight&, float, int half, const u32 (*b)[4], u32) {
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
    int offset_rows, const float* __restrict__ code, const u16* __restrict__ bias, u16* __restrict__ out,
    int rows, int n, int columns, int stride, int x_stride /* bytes of a row of x in shared memory */) {
    extern __shared__ __align__(1024) u8 shared[];
    const int thread = threadIdx.x, lane = thread % 32, across = thread / 32 / ALONG, along = thread / 32 % ALONG;
    const u32 rank = cluster_rank();
    const Weight weight = {tiles, absmax, nested_absmax, nested_code, offset, (u32)offset_rows, (u32)n, (u32)columns};
    // The last block starts earlier rather than end late: some rows are computed twice, to the same bits.
    const int block_strip = min(blockIdx.x / CLUSTER * BLOCK_STRIPS, n / 16 - BLOCK_STRIPS);
    const int first_strip = block_strip + across * STRIPS, begin = rank * columns / CLUSTER;
    const int end = (rank + 1) * columns / CLUSTER, steps = (end - begin + STEP - 1) / STEP;
    const u32 row = first_strip * 16 + lane / 4, base = (u32)__cvta_generic_to_shared(shared);
    const u32 table = BITS == 4 ? (TABLE_BYTES - base % 32768) % 32768 : 0;  // where it begins

    // Weights do not depend on the kernel before this one; nothing else is read or written until it is done.
    float offsets[STRIPS];
#pragma unroll
    for (int i = 0; i < STRIPS; ++i) offsets[i] = offset_of(weight, (first_strip + i) * 16);
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
    const float entry = __ldg(code + thread % 16);
#endif
    await_the_kernel_before();
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
#if BITS == 4
    fill_table(shared + table, entry, thread);  // while x is on its way
#endif

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
                const float scales[2] = {scale_of(now, 0, weight, offsets[i]), scale_of(now, 1, weight, offsets[i])};
                compute(part, now, weight, offsets[i], 0, b[0], mine);
                compute(part, now, weight, offsets[i], 1, b[1], mine);
#pragma unroll
                for (int j = 0; j < 4 * GROUPS; ++j)
                    sum[i][j / 4][j % 4] = __fmaf_rn(part[j / 4][j % 4], scales[j % 4 / 2], sum[i][j / 4][j % 4]);
#else
                compute(sum[i], now, weight, offsets[i], 0, b[0], mine);
                compute(sum[i], now, weight, offsets[i], 1, b[1], mine);
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
                    compute(sum[i], tile[d][i], weight, offsets[i], half, b, mine);
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
    stay_until_read();
#endif
}
