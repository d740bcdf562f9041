// What the kernels over tiled weights share: tiles from memory to registers, the table of 4-bit pairs, clusters of blocks.
//
// Macros: BITS, HALF, PER_SCALE, NESTED, CLUSTER as the kernel's file explains them; THREADS of a block.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

#if HALF
#define TYPE "f16"
#else
#define TYPE "bf16"
#endif

// Programmatic dependent launch: until the kernel before is done and its writes are seen. Only then may the next one start:
// it then finds all kernels before this one done, even if it does not wait for this one before it reads what they wrote.
__device__ __forceinline__ void await_the_kernel_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#define TABLE_BYTES (BITS == 4 ? 32768 : 0)

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

// Until the cluster's other blocks have read from this one. Nothing written must be seen afterwards, so that no thread
// waits for its stores; what it read, it has used.
__device__ __forceinline__ void stay_until_read() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
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
    // Of rows lane / 4 and 8 + lane / 4, 4 bits only. Nested scales are made when they are used: a lookup here would wait
    // for its code to come from memory.
#if NESTED
    u32 code[2];
    float outer[2];
#else
    float scale[2];
#endif
};

struct Weight {
    const u8* tiles;
    const void* absmax;          // 4 bits: float, or u8 where nested, [k / blocksize, n]; 8 bits: float [n]
    const float* nested_absmax;  // [blocks / 256]
    const float* nested_code;    // [256]
    const float* offset;         // [n / offset_rows]
    u32 offset_rows;             // a multiple of 16
    u32 n, columns;              // columns: k / 64
};

// Of the strip of 16 rows that `row` lies in.
__device__ __forceinline__ float offset_of(const Weight& w, u32 row) {
    return NESTED ? __ldg(w.offset + row / w.offset_rows) : 0;
}

#if BITS == 4
// The scale of row `row + below` in one block column, or what it is made from; `below` is known when this is compiled, so
// that addresses are shared. Behind the last column it is not the weight's.
__device__ __forceinline__ void load_scale(
    Tile& tile, int half, const Weight& w, u32 row, int below, u32 column, bool live) {
    const u32 block = column / PER_SCALE;
    const size_t at = block * w.n + row;
#if NESTED
    const u32 first = row * (w.columns / PER_SCALE) + block;
    tile.code[half] = live ? __ldg((const u8*)w.absmax + at + below) : 0;
    tile.outer[half] = live ? __ldg(w.nested_absmax + (first + below * (w.columns / PER_SCALE)) / 256) : 0;
#else
    tile.scale[half] = read((const float*)w.absmax + at + below, live);
#endif
}

__device__ __forceinline__ float scale_of(const Tile& tile, int half, const Weight& w, float offset) {
#if NESTED
    return __fmaf_rn(__ldg(w.nested_code + tile.code[half]), tile.outer[half], offset);
#else
    return tile.scale[half];
#endif
}
#endif

#define TILE_BYTES (BITS * 128)

// The lane's part of the tile that begins `at` bytes after the first; a weight has less than 4 GiB.
__device__ __forceinline__ void load(
    Tile& tile, const Weight& w, u32 at, u32 row, int below, u32 column, bool live) {
#pragma unroll
    for (int part = 0; part < BITS / 4; ++part) read(tile.words[part], w.tiles + at + part * 512, live);
#if BITS == 4
    load_scale(tile, 0, w, row, below, column, live);
    load_scale(tile, 1, w, row, below + 8, column, live);
#endif
}

#if BITS == 4
// Entry b of the table, 32 words for 32 lanes: the weights of byte b, that of the even column in the low half.
// `mine`: entry `thread % 16` of the code.
__device__ __forceinline__ void fill_table(u8* table, float mine, int thread) {
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
#endif
