// Products of f32 matrices for the backward of linear, grouped_linear and experts.
//
// Definition. C[i][j] is a sum over p: within blocks of BLOCK values one chain of fma in ascending p from zero, the blocks added in
// order. Every element has its own chain, so tiles and threads only decide what is read together, never a bit of the result.
//
// Bound by fma: a tile of 6 rows by 4 vectors reads 4 vectors and 6 scalars for 24 of them. A block of 64 columns of B is 64 KiB
// and serves the ROWS rows of a task from the second-level cache.
#include "simd.h"

#define UNROLL _Pragma("GCC unroll 32")

namespace {

constexpr int64_t BLOCK = 256, ROWS = 48;
#if BITTRUE_ISA_CODE == 2
constexpr int TILE_ROWS = 6, TILE_VECTORS = 4;
#else
constexpr int TILE_ROWS = 4, TILE_VECTORS = 1;
#endif
constexpr int64_t PANEL = 16 * TILE_VECTORS;

// A(i, p) = a[i * row + p * step], B(p, j) = b[p * b_row + j], C(i, j) = c[i * c_row + j].
struct Product {
    const float *a, *b;
    float* c;
    int64_t row, step, b_row, c_row;
};

// R rows by C vectors, the last of which has `last` lanes: sums over p in 0..num, added to what C holds unless it is the first.
template <int R, int C, bool IS_WHOLE> inline void tile(const Product& m, int64_t num, int64_t last, bool is_first) {
    const float *a = m.a, *b = m.b;
    const int64_t row = m.row, step = m.step;
    f32x16 acc[R][C];
    UNROLL for (int r = 0; r < R; ++r) UNROLL for (int c = 0; c < C; ++c) acc[r][c] = zero();
    for (int64_t p = 0; p < num; ++p, a += step, b += m.b_row) {
        f32x16 v[C];
        UNROLL for (int c = 0; c < C; ++c) v[c] = IS_WHOLE || c + 1 < C ? load(b + 16 * c) : load_n(b + 16 * c, last);
        UNROLL for (int r = 0; r < R; ++r) {
            const f32x16 x = set1(a[r * row]);
            UNROLL for (int c = 0; c < C; ++c) acc[r][c] = fma(x, v[c], acc[r][c]);
        }
    }
    UNROLL for (int r = 0; r < R; ++r) UNROLL for (int c = 0; c < C; ++c) {
        float* out = m.c + r * m.c_row + 16 * c;
        if (IS_WHOLE || c + 1 < C) store(out, is_first ? acc[r][c] : add(load(out), acc[r][c]));
        else store_n(out, is_first ? acc[r][c] : add(load_n(out, last), acc[r][c]), last);
    }
}

template <int R, int C> inline void tile(const Product& m, int64_t num, int64_t last, bool is_first) {
    if (last == 16) tile<R, C, true>(m, num, last, is_first);
    else tile<R, C, false>(m, num, last, is_first);
}

template <int R> inline void tile_rows(const Product& m, int64_t num, int64_t columns, bool is_first) {
    const int64_t vectors = (columns + 15) / 16, last = columns - 16 * (vectors - 1);
    if constexpr (TILE_VECTORS > 1) {
        if (vectors == 4) return tile<R, 4>(m, num, last, is_first);
        if (vectors == 3) return tile<R, 3>(m, num, last, is_first);
        if (vectors == 2) return tile<R, 2>(m, num, last, is_first);
    }
    tile<R, 1>(m, num, last, is_first);
}

// One block of p for rows 0..rows and at most PANEL columns.
inline void block(Product m, int64_t rows, int64_t num, int64_t columns, bool is_first) {
    for (; rows >= TILE_ROWS; rows -= TILE_ROWS) {
        tile_rows<TILE_ROWS>(m, num, columns, is_first);
        m.a += TILE_ROWS * m.row;
        m.c += TILE_ROWS * m.c_row;
    }
    if (rows == 1) tile_rows<1>(m, num, columns, is_first);
    if (rows == 2) tile_rows<2>(m, num, columns, is_first);
    if (rows == 3) tile_rows<3>(m, num, columns, is_first);
    if constexpr (TILE_ROWS > 4) {
        if (rows == 4) tile_rows<4>(m, num, columns, is_first);
        if (rows == 5) tile_rows<5>(m, num, columns, is_first);
    }
}

thread_local Scratch packed_a, packed_b;
constexpr int64_t FAR = 256;  // elements: rows a power of two and more apart fall into few sets of the first-level cache

// The first n elements of num rows, `from` apart, to rows `to` apart.
const float* pack(const float* x, int64_t from, int64_t n, int64_t num, float* out, int64_t to) {
    for (int64_t p = 0; p < num; ++p) std::memcpy(out + p * to, x + p * from, size_t(n) * 4);
    return out;
}

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace

// `groups` products C [rows, columns] (+)= A [rows, num] B [num, columns], see Product; a_group, b_group, c_group: elements from
// one group to the next. add: C is added to, and then its sum comes first.
BITTRUE_EXPORT(grad_product)(const float* a, int64_t a_row, int64_t a_step, int64_t a_group, const float* b, int64_t b_row,
                             int64_t b_group, float* c, int64_t c_row, int64_t c_group, int64_t groups, int64_t rows,
                             int64_t num, int64_t columns, int64_t is_added) {
    const int64_t chunks = (rows + ROWS - 1) / ROWS, panels = (columns + PANEL - 1) / PANEL;
    PARALLEL_FOR(task, groups * chunks * panels, groups * rows * columns * (num + 1)) {
        const int64_t j = task % panels * PANEL, rest = task / panels, i = rest % chunks * ROWS, g = rest / chunks;
        const int64_t n = least(ROWS, rows - i), width = least(PANEL, columns - j);
        Product m{a + g * a_group + i * a_row, b + g * b_group + j, c + g * c_group + i * c_row + j, a_row, a_step, b_row, c_row};
        // Even no p at all is one block: of sums that are zero.
        for (int64_t p = 0; p == 0 || p < num; p += BLOCK) {
            const int64_t block_num = least(BLOCK, num - p);
            Product part = m;
            if (a_row == 1 && a_step > ROWS)
                part.a = pack(m.a, a_step, n, block_num, packed_a.get<float>(BLOCK * ROWS), ROWS), part.step = ROWS;
            if (b_row > FAR)
                part.b = pack(m.b, b_row, width, block_num, packed_b.get<float>(BLOCK * PANEL), PANEL), part.b_row = PANEL;
            block(part, n, block_num, width, p == 0 && !is_added);
            m.a += BLOCK * a_step;
            m.b += BLOCK * b_row;
        }
    };
}
