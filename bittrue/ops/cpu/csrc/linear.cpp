// linear, linears and grouped_linear: rows times stored matrices, parallel over panels of outputs.
#include "matmul.h"

namespace {

constexpr int64_t CHUNK_FLOATS = 4 << 20;  // f32 copies of the input rows of one pass: half a last-level cache

thread_local Scratch prepared_rows, row_pointers;

struct Input {
    const void* data;  // [rows, groups, inputs]
    int64_t dtype, rows, groups, inputs;
};

// One matrix [groups * outputs, inputs] and its result [rows, groups, outputs]. Laid out as records in ops/cpu/matrix.py.
struct Product {
    const void* data;
    const uint8_t* scale;
    int64_t format, outputs, quantize;
    void* out;
    int64_t out_dtype;

    BT RowForm form() const { return row_form(format, quantize != 0); }
    BT int64_t panels() const { return (outputs + PANEL_OUTPUTS - 1) / PANEL_OUTPUTS; }
};

// The rows of x[first : first + n] in every form that a product needs: pointers[form][group][row].
struct Rows {
    const float** pointers;
    int64_t of[ROW_FORMS];  // where a form's pointers begin
};

template <class In>
Rows prepare_rows(const In* x, const Input& in, int64_t first, int64_t n, const Product* products, int64_t count) {
    const int64_t kp = padded(in.inputs), rows = n * in.groups;
    bool is_needed[ROW_FORMS] = {};
    for (int64_t p = 0; p < count; ++p) is_needed[products[p].form().index()] = true;
    const bool is_in_place = sizeof(In) == 4 && kp == in.inputs;  // true of the form 0 only
    int64_t forms = 0, copies = 0;
    for (int64_t f = 0; f < ROW_FORMS; ++f) forms += is_needed[f], copies += is_needed[f] && !(f == 0 && is_in_place);
    Rows result{row_pointers.get<const float*>(forms * rows), {}};
    float* copy = prepared_rows.get<float>(copies * rows * kp);
    int64_t at = 0;
    for (int64_t f = 0; f < ROW_FORMS; ++f) {
        if (!is_needed[f]) continue;
        const float** pointers = result.pointers + (result.of[f] = at);
        at += rows;
        const bool is_copied = f != 0 || !is_in_place;
        PARALLEL_FOR(i, rows, is_copied ? rows * kp * (f >= 2 ? 4 : 1) : 0) {
            const In* row = x + (first * in.groups + i) * in.inputs;
            const float*& pointer = pointers[i % in.groups * n + i / in.groups];
            pointer = reinterpret_cast<const float*>(row);
            if (is_copied) {
                prepare_row(row, in.inputs, row_form(f), copy + i * kp);
                pointer = copy + i * kp;
            }
        };
        if (is_copied) copy += rows * kp;
    }
    return result;
}

template <class In> void run(const In* x, const Input& in, const Product* products, int64_t count) {
    const int64_t row_floats = in.groups * padded(in.inputs);
    int64_t chunk = CHUNK_FLOATS / (row_floats > 0 ? row_floats : 1);
    chunk = chunk < 16 ? 16 : chunk > 512 ? 512 : chunk;
    int64_t tasks = 0, outputs = 0;
    for (int64_t p = 0; p < count; ++p) tasks += in.groups * products[p].panels(), outputs += products[p].outputs;
    for (int64_t first = 0; first < in.rows; first += chunk) {
        const int64_t n = in.rows - first < chunk ? in.rows - first : chunk;
        const Rows rows = prepare_rows(x, in, first, n, products, count);
        PARALLEL_FOR(i, tasks, n * in.groups * in.inputs * outputs) {
            int64_t task = i;
            const Product* p = products;
            for (; task >= in.groups * p->panels(); ++p) task -= in.groups * p->panels();
            const int64_t g = task / p->panels(), o = task % p->panels() * PANEL_OUTPUTS;
            const int64_t width = p->outputs - o < PANEL_OUTPUTS ? p->outputs - o : PANEL_OUTPUTS;
            const int64_t start = (first * in.groups + g) * p->outputs + o;
            void* out = static_cast<char*>(p->out) + start * (p->out_dtype == 0 ? 4 : 2);
            panel(rows.pointers + rows.of[p->form().index()] + g * n, n, Matrix{p->data, p->scale, p->format, in.inputs},
                  g * p->outputs + o, width, Target{out, in.groups * p->outputs, p->out_dtype != 0});
        };
    }
}

void run(const Input& in, const Product* products, int64_t count) {
    if (in.dtype == 0) run(static_cast<const float*>(in.data), in, products, count);
    else run(static_cast<const bf16*>(in.data), in, products, count);
}

}  // namespace

// x [rows, groups, inputs] (x_dtype) by the matrix [groups * outputs, inputs] -> out [rows, groups, outputs] (out_dtype).
BITTRUE_EXPORT(linear)(const void* x, int64_t x_dtype, int64_t rows, int64_t groups, int64_t inputs, int64_t outputs,
                       const void* data, const uint8_t* scale, int64_t format, int64_t quantize, void* out,
                       int64_t out_dtype) {
    const Product product{data, scale, format, outputs, quantize, out, out_dtype};
    run(Input{x, x_dtype, rows, groups, inputs}, &product, 1);
}
BITTRUE_REPLAYABLE(linear)

// x [rows, inputs] by each of `count` matrices, see Product.
BITTRUE_EXPORT(linears)(const void* x, int64_t x_dtype, int64_t rows, int64_t inputs, const void* products, int64_t count) {
    run(Input{x, x_dtype, rows, 1, inputs}, static_cast<const Product*>(products), count);
}
BITTRUE_REPLAYABLE(linears)

// The matrix [outputs, inputs] as f32, exact, by what the products decode with.
BITTRUE_EXPORT(dequantize)(const void* data, const uint8_t* scale, int64_t format, int64_t outputs, int64_t inputs,
                           float* out) {
    const Matrix m{data, scale, format, inputs};
    PARALLEL_FOR(o, outputs, outputs * inputs) {
        float* row = prepared_rows.get<float>(padded(inputs));
        if (format == FORMAT_F32) decode_row<PlainRow<float>>(m, o, row);
        else if (format == FORMAT_BF16) decode_row<PlainRow<bf16>>(m, o, row);
        else if (format == FORMAT_FP8) decode_row<Fp8Row<true>>(m, o, row);
        else decode_row<Fp4Row>(m, o, row);
        for (int64_t k = 0; format == FORMAT_FP4 && k < inputs; k += 16) store(row + k, from_fp4_order(load(row + k)));
        std::memcpy(out + o * inputs, row, size_t(inputs) * 4);
    };
}
