// linear and grouped_linear: rows times a stored matrix, parallel over panels of outputs.
#include "matmul.h"

namespace {

constexpr int64_t CHUNK_FLOATS = 4 << 20;  // f32 copies of the input rows of one pass: half a last-level cache

thread_local Scratch wide_rows, row_pointers;

struct Shape {
    int64_t rows, groups, inputs, outputs;  // x [rows, groups, inputs], result [rows, groups, outputs]
};

// Pointers to the padded f32 rows of x[first : first + n], ordered group by group.
template <class In> const float** gather_rows(const In* x, const Shape& s, int64_t first, int64_t n) {
    const int64_t kp = padded(s.inputs);
    const float** pointers = row_pointers.get<const float*>(n * s.groups);
    const bool in_place = sizeof(In) == 4 && kp == s.inputs;
    float* wide = in_place ? nullptr : wide_rows.get<float>(n * s.groups * kp);
    PARALLEL_FOR(i, n * s.groups, n * s.groups * kp) {
        const In* row = x + (first * s.groups + i) * s.inputs;
        if (in_place) {
            pointers[i % s.groups * n + i / s.groups] = reinterpret_cast<const float*>(row);
        } else {
            widen_row(row, s.inputs, wide + i * kp);
            pointers[i % s.groups * n + i / s.groups] = wide + i * kp;
        }
    };
    return pointers;
}

template <class In, class Out> void run(const In* x, const Shape& s, const Matrix& m, int64_t format, Out* out) {
    const int64_t row_floats = s.groups * padded(s.inputs);
    int64_t chunk = CHUNK_FLOATS / (row_floats > 0 ? row_floats : 1);
    chunk = chunk < 16 ? 16 : chunk > 512 ? 512 : chunk;
    const int64_t panels = (s.outputs + PANEL_OUTPUTS - 1) / PANEL_OUTPUTS;
    for (int64_t first = 0; first < s.rows; first += chunk) {
        const int64_t n = s.rows - first < chunk ? s.rows - first : chunk;
        const float* const* pointers = gather_rows(x, s, first, n);
        PARALLEL_FOR(task, s.groups * panels, n * s.groups * s.inputs * s.outputs) {
            const int64_t g = task / panels, o = task % panels * PANEL_OUTPUTS;
            const int64_t count = s.outputs - o < PANEL_OUTPUTS ? s.outputs - o : PANEL_OUTPUTS;
            panel(format, pointers + g * n, n, m, g * s.outputs + o, count,
                  out + (first * s.groups + g) * s.outputs + o, s.groups * s.outputs);
        };
    }
}

}  // namespace

// x [rows, groups, inputs] (x_dtype) by the matrix [groups * outputs, inputs] -> out [rows, groups, outputs] (out_dtype).
BITTRUE_EXPORT(linear)(const void* x, int64_t x_dtype, int64_t rows, int64_t groups, int64_t inputs, int64_t outputs,
                       const void* data, const uint8_t* scale, int64_t format, void* out, int64_t out_dtype) {
    const Shape s{rows, groups, inputs, outputs};
    const Matrix m{data, scale, inputs};
    if (x_dtype == 0 && out_dtype == 0) run(static_cast<const float*>(x), s, m, format, static_cast<float*>(out));
    else if (x_dtype == 0) run(static_cast<const float*>(x), s, m, format, static_cast<bf16*>(out));
    else if (out_dtype == 0) run(static_cast<const bf16*>(x), s, m, format, static_cast<float*>(out));
    else run(static_cast<const bf16*>(x), s, m, format, static_cast<bf16*>(out));
}
BITTRUE_REPLAYABLE(linear)

// The matrix [outputs, inputs] as f32, exact.
BITTRUE_EXPORT(dequantize)(const void* data, const uint8_t* scale, int64_t format, int64_t outputs, int64_t inputs,
                           float* out) {
    const Matrix m{data, scale, inputs};
    PARALLEL_FOR(o, outputs, outputs * inputs) {
        float* row = wide_rows.get<float>(padded(inputs));
        if (format == FORMAT_F32) decode_row<PlainRow<float>>(m, o, row);
        else if (format == FORMAT_BF16) decode_row<PlainRow<bf16>>(m, o, row);
        else if (format == FORMAT_FP8) decode_row<Fp8Row>(m, o, row);
        else decode_row<Fp4Row>(m, o, row);
        std::memcpy(out + o * inputs, row, size_t(inputs) * 4);
    };
}
