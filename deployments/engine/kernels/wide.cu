// Tens to hundreds of rows of 16-bit activations times a tiled 4-bit or 8-bit weight: out = x W^T + bias.
//
// Compiled at run time, after tiles.cuh, for GPUs of capability 9.0, with these macros:
//   BITS, HALF, PER_SCALE, NESTED   as in skinny.cu
//   ROWS      rows of x that a block computes: 32, 64, 128 or 256
//   DEPTH     64-column blocks that a warp reads ahead: 2 or 4
//   ACROSS    warpgroups of a block side by side, each over 64 rows of the weight
//   ALONG     warpgroups of a block along the columns
//   CLUSTER   blocks along the columns; they sum through each other's shared memory
//   SLOTS     of the ring that x comes through, 3 to 6; two are not filled ahead
//   BUFFERS   1 or 2: 2 lets a warpgroup look up its next weights while the matrix units still read the last ones
//
// out^T = W x^T with wgmma: the weight is the left operand, looked up or widened into registers, 16 rows to a warp; x is
// the right one, which tensor copies (TMA) bring to shared memory, where the matrix units read it themselves: each weight is
// looked up once for all ROWS. Warpgroups run on their own, as slots of x become full and empty. 4-bit weights are scaled before the product, in 16 bits, and sums run through all columns in the matrix units.
// Sums of a row of x do not depend on the other rows; their order depends on ALONG and CLUSTER alone.

typedef unsigned long long u64;

#define PANEL 64  // rows of the weight that a warpgroup computes
#define BLOCK_ROWS (PANEL * ACROSS)
#define SUM_STRIDE (BLOCK_ROWS + 4)
#define SUMS (ROWS / 2)             // of a lane
#define SLICE_BYTES (ROWS * 128)    // 64 columns of x
#define SLOT_BYTES (ALONG * SLICE_BYTES)
#define SUM_BYTES (4u * ALONG * ROWS * SUM_STRIDE)
#define AHEAD (SLOTS - 2)

// Operands of one wgmma, counted from the first.
#define N8(a, b, c, d, e, f, g, h) "%" #a ",%" #b ",%" #c ",%" #d ",%" #e ",%" #f ",%" #g ",%" #h
#define F4(i) "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3])
#define F16(i) F4(i), F4(i + 4), F4(i + 8), F4(i + 12)
#define LIST16 N8(0, 1, 2, 3, 4, 5, 6, 7) "," N8(8, 9, 10, 11, 12, 13, 14, 15)
#define LIST32 LIST16 "," N8(16, 17, 18, 19, 20, 21, 22, 23) "," N8(24, 25, 26, 27, 28, 29, 30, 31)
#define LIST64 LIST32 "," N8(32, 33, 34, 35, 36, 37, 38, 39) "," N8(40, 41, 42, 43, 44, 45, 46, 47) "," \
               N8(48, 49, 50, 51, 52, 53, 54, 55) "," N8(56, 57, 58, 59, 60, 61, 62, 63)
#define LIST96 LIST64 "," N8(64, 65, 66, 67, 68, 69, 70, 71) "," N8(72, 73, 74, 75, 76, 77, 78, 79) "," \
               N8(80, 81, 82, 83, 84, 85, 86, 87) "," N8(88, 89, 90, 91, 92, 93, 94, 95)
#define LIST128 LIST96 "," N8(96, 97, 98, 99, 100, 101, 102, 103) "," N8(104, 105, 106, 107, 108, 109, 110, 111) "," \
                N8(112, 113, 114, 115, 116, 117, 118, 119) "," N8(120, 121, 122, 123, 124, 125, 126, 127)

// 64 rows by 16 columns of the weight times 16 columns of x; runs on until `wait_for_products`.
__device__ __forceinline__ void multiply(float (&sum)[SUMS], const u32 (&a)[4], u64 x) {
#if ROWS == 32
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPE "." TYPE " {" LIST16 "}, {%16,%17,%18,%19}, %20, 1, 1, 1, 0;"
                 : F16(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x));
#elif ROWS == 64
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" LIST32 "}, {%32,%33,%34,%35}, %36, 1, 1, 1, 0;"
                 : F16(0), F16(16) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x));
#elif ROWS == 128
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" LIST64 "}, {%64,%65,%66,%67}, %68, 1, 1, 1, 0;"
                 : F16(0), F16(16), F16(32), F16(48) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x));
#else
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " {" LIST128 "}, {%128,%129,%130,%131}, %132, 1, 1, 1, 0;"
                 : F16(0), F16(16), F16(32), F16(48), F16(64), F16(80), F16(96), F16(112)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x));
#endif
}

// Until at most `pending` groups of products run.
template <int pending> __device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(pending) : "memory");
}

// Of 64 columns of x at `at`, 128 bytes a row, swizzled by 128 bytes: eight rows are 1,024 bytes.
__device__ __forceinline__ u64 matrix_at(u32 at) {
    return (u64)(at >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

// The 64 columns of a tile as four left operands.
__device__ __forceinline__ void decode(
    u32 (&a)[4][4], const Tile& tile, const Weight& weight, float offset, bool live, u32 mine) {
#if BITS == 4
    const float top = live ? scale_of(tile, 0, weight, offset) : 0, bottom = live ? scale_of(tile, 1, weight, offset) : 0;
    const u32 scales[2] = {pack(top, top), pack(bottom, bottom)};
    const u32 words[2][2] = {{tile.words[0].x, tile.words[0].y}, {tile.words[0].z, tile.words[0].w}};
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk)
#pragma unroll
        for (int i = 0; i < 4; ++i)  // i % 2: upper or lower 8 rows; i / 2: first or second 8 columns
            a[chunk][i] = scaled(look_up(words[i % 2][chunk / 2], chunk % 2 * 2 + i / 2, mine), scales[i % 2]);
#else
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk) {
        const uint4& words = tile.words[chunk / 2];
        const u32 top = chunk % 2 ? words.y : words.x, bottom = chunk % 2 ? words.w : words.z;
        a[chunk][0] = widen_pair(top), a[chunk][1] = widen_pair(bottom);
        a[chunk][2] = widen_pair(top >> 8), a[chunk][3] = widen_pair(bottom >> 8);
    }
#endif
}

__device__ __forceinline__ float4 four_of_rank(u32 at, u32 rank) {
    float4 value;
#if CLUSTER > 1
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w) : "r"(there));
#else
    asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w) : "r"(at));
#endif
    return value;
}

// The compiler may not give these registers to others before this point.
__device__ __forceinline__ void keep(u32 (&a)[4][4]) {
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk)
        asm volatile("" : "+r"(a[chunk][0]), "+r"(a[chunk][1]), "+r"(a[chunk][2]), "+r"(a[chunk][3]) :: "memory");
}

struct alignas(64) TensorMap {
    u8 bytes[128];
};

__device__ __forceinline__ void make_barrier(u32 at, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(at), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}

// Until the phase of that parity is over.
__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
    asm volatile("{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@done bra OVER;\nbra AGAIN;\nOVER:\n}" :: "r"(barrier), "r"(parity) : "memory");
}

// ALONG slices from `column` on into a slot, swizzled; zeros for rows that are not there, and for columns from `end` on.
__device__ __forceinline__ void copy_slot(const TensorMap& x, int first_m, int column, int end, int k, u32 slot, u32 full) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(full), "r"(SLOT_BYTES) : "memory");
#pragma unroll
    for (int slice = 0; slice < ALONG; ++slice)
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                     :: "r"(slot + slice * SLICE_BYTES), "l"(&x), "r"(column + slice < end ? (column + slice) * 64 : k),
                        "r"(first_m), "r"(full) : "memory");
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) wide(
    const __grid_constant__ TensorMap x, const u8* __restrict__ tiles, const void* __restrict__ absmax,
    const float* __restrict__ nested_absmax, const float* __restrict__ nested_code, const float* __restrict__ offset,
    int offset_rows, const float* __restrict__ code, const u16* __restrict__ bias, u16* __restrict__ out,
    int rows, int n, int columns, int row_blocks) {
    extern __shared__ __align__(1024) u8 shared[];
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32 % 4, group = thread / 128;
    const int across = group / ALONG, along = group % ALONG;
    const u32 rank = cluster_rank();
    const Weight weight = {tiles, absmax, nested_absmax, nested_code, offset, (u32)offset_rows, (u32)n, (u32)columns};
    // Blocks over the same rows of the weight follow each other, so that one of them takes it from memory.
    const int unit = blockIdx.x / CLUSTER, first_m = unit % row_blocks * ROWS;
    // The last block starts earlier rather than end late: some rows are computed twice, to the same bits.
    const int block_row = min(unit / row_blocks * BLOCK_ROWS, n - BLOCK_ROWS);
    const int begin = rank * columns / CLUSTER, end = (rank + 1) * columns / CLUSTER;
    const int steps = ((end - begin + ALONG - 1) / ALONG + DEPTH - 1) / DEPTH * DEPTH;  // at the end some of zeros
    const u32 row = block_row + across * PANEL + warp * 16 + lane / 4, base = (u32)__cvta_generic_to_shared(shared);
    const u32 table = BITS == 4 ? (TABLE_BYTES - base % 32768) % 32768 : (1024 - base % 1024) % 1024;

    // Weights do not depend on the kernel before this one; nothing else is read or written until it is done.
    const float strip_offset = offset_of(weight, row);
    Tile tile[DEPTH];
    const u32 first = (u32)(block_row / 16 + across * 4 + warp) * (u32)columns * TILE_BYTES + lane * 16;
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
        const int column = begin + d * ALONG + along;
        load(tile[d], weight, first + column * TILE_BYTES, row, 0, column, column < end);
    }
#if BITS == 4
    const float entry = __ldg(code + thread % 16);
#endif
    // A slot is full when its copies are there, and empty when all warps have computed with it. The sums at the end lie over
    // the ring, but not over its barriers: an arrival may still be on its way when all threads have met.
    const u32 ring = base + table + TABLE_BYTES, behind = table + TABLE_BYTES + SLOTS * SLOT_BYTES;
    const u32 full = base + (behind > SUM_BYTES ? behind : SUM_BYTES), empty = full + SLOTS * 8;
    const u32 mine = base + table + lane * 4;
    if (thread == 0) {
        for (int s = 0; s < SLOTS; ++s) {
            make_barrier(full + s * 8, 1);
            make_barrier(empty + s * 8, THREADS / 32);
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    await_the_kernel_before();
    if (thread == 0)
        for (int s = 0; s < AHEAD && s < steps; ++s)
            copy_slot(x, first_m, begin + s * ALONG, end, columns * 64, ring + s * SLOT_BYTES, full + s * 8);
    __syncwarp();
#if BITS == 4
    fill_table(shared + table, entry, thread);  // while x is on its way
#endif
    __syncthreads();

    float sum[SUMS] = {};
    u32 a[BUFFERS][4][4];
    u32 slot = 0, parity = 0, last = 0, ahead = AHEAD, ahead_parity = 1;  // a wait for the phase before the first ends at once
#pragma unroll 1
    for (int step = 0; step < steps; step += DEPTH) {
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {
            const int column = begin + (step + d) * ALONG + along, next = column + DEPTH * ALONG;
            if (thread == 0 && step + d + AHEAD < steps) {
                wait(empty + ahead * 8, ahead_parity);
                copy_slot(x, first_m, begin + (step + d + AHEAD) * ALONG, end, columns * 64, ring + ahead * SLOT_BYTES,
                          full + ahead * 8);
            }
            __syncwarp();
            if (++ahead == SLOTS) ahead = 0, ahead_parity ^= 1;

            u32(&weights)[4][4] = a[d % BUFFERS];
#if BUFFERS == 1
            wait_for_products<0>();
            keep(weights);
            if (lane == 0 && step + d > 0) arrive(empty + last * 8);
#endif
            decode(weights, tile[d], weight, strip_offset, column < end, mine);
            keep(weights);
            load(tile[d], weight, first + next * TILE_BYTES, row, 0, next, next < end);

            wait(full + slot * 8, parity);
            const u64 matrix = matrix_at(ring + slot * SLOT_BYTES + along * SLICE_BYTES);
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (int chunk = 0; chunk < 4; ++chunk) multiply(sum, weights[chunk], matrix + chunk * 2);
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#if BUFFERS == 2
            wait_for_products<1>();
            keep(a[(d + 1) % 2]);
            if (lane == 0 && step + d > 0) arrive(empty + last * 8);
#endif
            last = slot;
            if (++slot == SLOTS) slot = 0, parity ^= 1;
        }
    }
    wait_for_products<0>();
#pragma unroll
    for (int i = 0; i < SUMS; ++i) asm volatile("" : "+f"(sum[i]) :: "memory");

    // [ALONG][rows of x][rows of the weight], over what is not needed any more.
    float* sums = (float*)shared;
    __syncthreads();
    const int live_rows = min(rows - first_m, ROWS), local = across * PANEL + warp * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < SUMS; ++i) {
        const int m = i / 4 * 8 + lane % 4 * 2 + i % 2;
        sums[(along * ROWS + m) * SUM_STRIDE + local + i % 4 / 2 * 8] = sum[i];
    }
    __syncthreads();
    if (ALONG > 1) {
        for (int i = thread; i < live_rows * (BLOCK_ROWS / 4); i += THREADS) {
            float4* at = (float4*)(sums + i / (BLOCK_ROWS / 4) * SUM_STRIDE + i % (BLOCK_ROWS / 4) * 4);
            float4 total = at[0];
#pragma unroll
            for (int part = 1; part < ALONG; ++part) {
                const float4 other = at[part * ROWS * SUM_STRIDE / 4];
                total.x += other.x, total.y += other.y, total.z += other.z, total.w += other.w;
            }
            at[0] = total;
        }
    }
    cluster_barrier();
    const int share = BLOCK_ROWS / CLUSTER, fours = share / 4;  // rows of the weight that this block writes
#pragma unroll 2
    for (int i = thread; i < live_rows * fours; i += THREADS) {
        const int m = i / fours, at = rank * share + i % fours * 4, to = block_row + at;
        float4 total = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int other = 0; other < CLUSTER; ++other) {
            const float4 part = four_of_rank(base + (m * SUM_STRIDE + at) * 4, other);
            total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
        }
#if BITS == 8
        const float4 scale = *(const float4*)((const float*)absmax + to);
        total.x *= scale.x / 127.0f, total.y *= scale.y / 127.0f, total.z *= scale.z / 127.0f, total.w *= scale.w / 127.0f;
#endif
        if (bias != nullptr) {
            total.x += widen(bias[to]), total.y += widen(bias[to + 1]);
            total.z += widen(bias[to + 2]), total.w += widen(bias[to + 3]);
        }
        *(uint2*)(out + (size_t)(first_m + m) * n + to) = make_uint2(pack(total.x, total.y), pack(total.z, total.w));
    }
#if CLUSTER > 1
    stay_until_read();
#endif
}
