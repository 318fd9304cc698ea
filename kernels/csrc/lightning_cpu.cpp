// Lightning attention on the CPU: forward, backward and decode, for float32 and bfloat16 tensors with float32 states.
//
// Per head, with decay l = exp(-slope):  S_t = l S_{t-1} + k_t v_t^T,  o_t = q_t S_t.
// Tokens are handled in blocks of BLOCK: inside a block the masked quadratic form, between blocks the state S
// (MiniMax-01, arXiv 2501.08313 section 2.2). Everything a block needs is packed into small float32 buffers that stay in
// the first-level cache; one family of register-tiled matrix products does the arithmetic. Powers of the decay
// always have exponents >= 0, so strong decay underflows to zero and never overflows.
//
// Built without any header of PyTorch and called through a plain C interface: an array of int64 (see the structs).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include "vector.h"

namespace {

constexpr int BLOCK = 32;  // tokens per block: fewest operations that still hide the state's loads and stores
constexpr int PAD = 16;    // rows and head dims are padded with zeros to a multiple of this
static_assert(PAD % VL == 0 && BLOCK % PAD == 0);

inline int64_t round_up(int64_t x) { return (x + PAD - 1) / PAD * PAD; }

// ---- element types ------------------------------------------------------------------------------------------

struct bf16 { uint16_t bits; };

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline void from_float(float x, float& y) { y = x; }
inline void from_float(float x, bf16& y) {  // round to nearest even; NaN stays NaN
  uint32_t u;
  memcpy(&u, &x, 4);
  y.bits = x != x ? 0x7fc0 : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

inline vec load_as_float(const float* p) { return load(p); }
inline vec load_as_float(const bf16* p) {
  half_vec h = *reinterpret_cast<const half_vec_unaligned*>(p);
  return (vec)(__builtin_convertvector(h, uvec) << 16);
}
inline void store_from_float(float* p, vec x) { store(p, x); }
inline void store_from_float(bf16* p, vec x) {
  uvec u = (uvec)x;
  uvec r = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  uvec is_nan = (uvec)(x != x);
  r = (r & ~is_nan) | (is_nan & 0x7fc0);
  *reinterpret_cast<half_vec_unaligned*>(p) = __builtin_convertvector(r, half_vec);
}

// ---- matrix products on packed buffers ----------------------------------------------------------------------

// What becomes of the old content of a result or state: old * (keep + factor).
// A decay near 1 is kept as 1 + expm1: rounded to float32, thousands of equal factors would drift together.
struct Old {
  float keep, factor;
  bool any() const { return keep != 0.f || factor != 0.f; }

  static Old decayed(double exponent) {
    return exponent < 0.5 ? Old{1.f, float(std::expm1(-exponent))} : Old{0.f, float(std::exp(-exponent))};
  }
};
constexpr Old DROP{0.f, 0.f}, KEEP{1.f, 0.f};

// One register tile: C[MR x NR*VL] = old C + sum_k A(row, k) B[k][cols], A read at any two strides. With `decay`, row i and column j of the result are multiplied
// by decay[j - i]: an entry of the causal decay mask.
template <int MR, int NR>
inline __attribute__((always_inline)) void tile(const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t ldb,
                                                float* c, int64_t ldc, int64_t depth, Old old,
                                                const float* decay) {
  vec acc[MR][NR];
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NR; j++) {
      acc[i][j] = vec{};
      if (old.any()) {
        vec x = load(c + i * ldc + j * VL);
        acc[i][j] = x * old.keep + x * old.factor;
      }
    }
  for (int64_t k = 0; k < depth; k++) {
    vec row[NR];
    for (int j = 0; j < NR; j++) row[j] = load(b + k * ldb + j * VL);
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
      float x = a[i * a_row + k * a_k];
      for (int j = 0; j < NR; j++) acc[i][j] += x * row[j];
    }
  }
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NR; j++) {
      if (decay) acc[i][j] *= load(decay - i + j * VL);
      store(c + i * ldc + j * VL, acc[i][j]);
    }
}

#if defined(__AVX512F__)
constexpr int WIDE_ROWS = 8;
#else
constexpr int WIDE_ROWS = 4;
#endif

// 16 rows of the result, all `cols` columns.
inline void rows16(const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t ldb, float* c, int64_t ldc,
                   int64_t cols, int64_t depth, Old old, const float* decay) {
  int64_t j = 0;
  for (; j + 2 * VL <= cols; j += 2 * VL)
    for (int i = 0; i < 16; i += WIDE_ROWS)
      tile<WIDE_ROWS, 2>(a + i * a_row, a_row, a_k, b + j, ldb, c + i * ldc + j, ldc, depth, old,
                         decay ? decay - i + j : nullptr);
  for (; j < cols; j += VL)
    for (int i = 0; i < 16; i += 2 * WIDE_ROWS)
      tile<2 * WIDE_ROWS, 1>(a + i * a_row, a_row, a_k, b + j, ldb, c + i * ldc + j, ldc, depth, old,
                             decay ? decay - i + j : nullptr);
}

// C[rows x cols] = old C + A B
void product(const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t ldb, float* c, int64_t ldc,
             int64_t rows, int64_t cols, int64_t depth, Old old) {
  // Two vectors of columns at a time over all rows: that strip of B stays in the first-level cache.
  for (int64_t j = 0; j < cols; j += 2 * VL)
    for (int64_t i = 0; i < rows; i += 16)
      rows16(a + i * a_row, a_row, a_k, b + j, ldb, c + i * ldc + j, ldc, std::min<int64_t>(2 * VL, cols - j), depth,
             old, nullptr);
}

// Scores[i][j] = l^(i-j) X_i . Y_j for j <= i, zero above; Y is given transposed. Blocks above the diagonal stay unwritten.
void causal_scores(const float* x, const float* y_t, float* scores, const float* decay, int64_t rows, int64_t dim) {
  for (int64_t i = 0; i < rows; i += 16)
    rows16(x + i * dim, dim, 1, y_t, BLOCK, scores + i * BLOCK, BLOCK, i + 16, dim, DROP, decay - i);
}

// C[i] = old C[i] + sum_{j <= i} Scores[i][j] B[j]
void causal_product(const float* scores, const float* b, float* c, int64_t rows, int64_t dim, Old old) {
  for (int64_t i = 0; i < rows; i += 16)
    rows16(scores + i * BLOCK, BLOCK, 1, b, dim, c + i * dim, dim, dim, i + 16, old, nullptr);
}

// C[j] = old C[j] + sum_{i >= j} Scores[i][j] B[i]
void anticausal_product(const float* scores, const float* b, float* c, int64_t rows, int64_t dim, Old old) {
  for (int64_t j = 0; j < rows; j += 16)
    rows16(scores + j * BLOCK + j, 1, BLOCK, b + j * dim, dim, c + j * dim, dim, dim, rows - j, old, nullptr);
}

// C^T[a][j] = old C^T[a][j] + sum_{i >= j} B[i][a] Scores[i][j]
void anticausal_product_transposed(const float* scores, const float* b, float* c_t, int64_t rows, int64_t dim,
                                   Old old) {
  for (int64_t j = 0; j < rows; j += 16)
    for (int64_t a = 0; a < dim; a += 16)
      rows16(b + j * dim + a, 1, dim, scores + j * BLOCK + j, BLOCK, c_t + a * BLOCK + j, BLOCK, 16, rows - j, old,
             nullptr);
}

// ---- packing ------------------------------------------------------------------------------------------------

template <int STEP>
inline __attribute__((always_inline)) void transpose_step(vec* r) {
  ivec low, high;
  for (int i = 0; i < VL; i++) {
    low[i] = (i & STEP) ? VL + (i - STEP) : i;
    high[i] = (i & STEP) ? VL + i : i + STEP;
  }
  for (int i = 0; i < VL; i++)
    if (!(i & STEP)) {
      vec a = r[i], b = r[i + STEP];
      r[i] = __builtin_shuffle(a, b, low);
      r[i + STEP] = __builtin_shuffle(a, b, high);
    }
}

// out[j][i] = in[i][j]; rows and cols are multiples of VL.
void transpose(const float* in, int64_t ld_in, float* out, int64_t ld_out, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; i += VL)
    for (int64_t j = 0; j < cols; j += VL) {
      vec r[VL];
      for (int x = 0; x < VL; x++) r[x] = load(in + (i + x) * ld_in + j);
      if constexpr (VL >= 16) transpose_step<8>(r);
      if constexpr (VL >= 8) transpose_step<4>(r);
      transpose_step<2>(r);
      transpose_step<1>(r);
      for (int x = 0; x < VL; x++) store(out + (j + x) * ld_out + i, r[x]);
    }
}

// Copy a block of tokens into out[rows][dim] as float32, padded with zeros to whole rows and columns.
template <typename T>
void pack(const T* in, int64_t stride, int64_t tokens, int64_t width, float* out, int64_t rows, int64_t dim) {
  for (int64_t i = 0; i < tokens; i++) {
    const T* src = in + i * stride;
    float* dst = out + i * dim;
    int64_t j = 0;
    for (; j + VL <= width; j += VL) store(dst + j, load_as_float(src + j));
    for (; j < width; j++) dst[j] = to_float(src[j]);
    for (; j < dim; j++) dst[j] = 0.f;
  }
  if (rows > tokens) memset(out + tokens * dim, 0, (rows - tokens) * dim * sizeof(float));
}

template <typename T>
void unpack(const float* in, int64_t dim, T* out, int64_t stride, int64_t tokens, int64_t width) {
  for (int64_t i = 0; i < tokens; i++) {
    const float* src = in + i * dim;
    T* dst = out + i * stride;
    int64_t j = 0;
    for (; j + VL <= width; j += VL) store_from_float(dst + j, load(src + j));
    for (; j < width; j++) from_float(src[j], dst[j]);
  }
}

// out[i] = factor[step * i] in[i], row by row
void scale_rows(const float* in, float* out, const float* factor, int64_t step, int64_t tokens, int64_t rows,
                int64_t dim) {
  for (int64_t i = 0; i < rows; i++) {
    float f = i < tokens ? factor[step * i] : 0.f;
    for (int64_t j = 0; j < dim; j += VL) store(out + i * dim + j, load(in + i * dim + j) * f);
  }
}

void load_state(const float* in, int64_t width, float* out, int64_t dim, bool transposed) {
  memset(out, 0, dim * dim * sizeof(float));
  if (!in) return;
  for (int64_t i = 0; i < width; i++)
    for (int64_t j = 0; j < width; j++) (transposed ? out[j * dim + i] : out[i * dim + j]) = in[i * width + j];
}

void store_state(const float* in, int64_t dim, float* out, int64_t width) {
  for (int64_t i = 0; i < width; i++) memcpy(out + i * width, in + i * dim, width * sizeof(float));
}

// ---- one head of one sequence -------------------------------------------------------------------------------

// Powers of one head's decay. mask[x] = l^(-x) for x <= 0 and 0 above, so that mask + j - i is an entry of the causal mask.
struct Decay {
  double slope;
  float power[BLOCK + 1];
  float reversed[2 * BLOCK];
  const float* mask = reversed + BLOCK - 1;

  explicit Decay(double rate) : slope(rate) {
    double factor = std::exp(-slope), p = 1.0;
    memset(reversed, 0, sizeof reversed);
    for (int i = 0; i <= BLOCK; i++, p *= factor) {
      power[i] = float(p);
      if (i < BLOCK) reversed[BLOCK - 1 - i] = float(p);
    }
  }
  Decay(const Decay&) = delete;
};

// Cache-line aligned scratch memory, kept by each thread between calls.
struct Workspace {
  float* base = nullptr;
  size_t size = 0, used = 0;

  void reset(size_t floats) {
    used = 0;
    if (floats <= size) return;
    free(base);
    base = static_cast<float*>(aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64));
    if (!base) abort();
    size = floats;
  }
  float* take(size_t floats) {
    float* p = base + used;
    used += (floats + 15) / 16 * 16;
    return p;
  }
  ~Workspace() { free(base); }
};
thread_local Workspace workspace;

template <typename T>
struct Rows {  // the tokens of one head: row i begins at data + i * stride
  T* data;
  int64_t stride;
  T* at(int64_t i) const { return data + i * stride; }
};

// o = q S with S_t = l S_{t-1} + k_t v_t^T, first to last token; `state` (dim x dim) is read and left final.
template <typename T>
void forward_head(Rows<const T> q, Rows<const T> k, Rows<const T> v, Rows<T> o, const Decay& decay, float* state,
                  int64_t tokens, int64_t width, int64_t dim) {
  const size_t block = BLOCK * dim;
  float *qs = workspace.take(block), *ks = workspace.take(block), *vs = workspace.take(block);
  float *k_t = workspace.take(block), *scaled = workspace.take(block), *out = workspace.take(block);
  float* scores = workspace.take(BLOCK * BLOCK);
  for (int64_t t = 0; t < tokens; t += BLOCK) {
    const int64_t m = std::min<int64_t>(BLOCK, tokens - t), rows = round_up(m);
    pack(q.at(t), q.stride, m, width, qs, rows, dim);
    pack(k.at(t), k.stride, m, width, ks, rows, dim);
    pack(v.at(t), v.stride, m, width, vs, rows, dim);
    transpose(ks, dim, k_t, BLOCK, rows, dim);
    causal_scores(qs, k_t, scores, decay.mask, rows, dim);
    causal_product(scores, vs, out, rows, dim, DROP);
    scale_rows(qs, scaled, decay.power + 1, 1, m, rows, dim);
    product(scaled, dim, 1, state, dim, out, dim, rows, dim, dim, KEEP);
    unpack(out, dim, o.at(t), o.stride, m, width);
    scale_rows(ks, scaled, decay.power + m - 1, -1, m, rows, dim);
    product(scaled, 1, dim, vs, dim, state, dim, dim, dim, m, Old::decayed(decay.slope * m));
  }
}

// dk and dv, last to first token; `grad` is the gradient of the state after the last token and is left as that of
// the state before the first: G_{t-1} = l (G_t + q_t^T do_t), dk_t = v_t (G_t + ..)^T, dv_t = k_t (G_t + ..).
template <typename T>
void backward_head(Rows<const T> q, Rows<const T> k, Rows<const T> v, Rows<const T> d_o, Rows<T> dk, Rows<T> dv,
                   const Decay& decay, float* grad, int64_t tokens, int64_t width, int64_t dim) {
  const size_t block = BLOCK * dim;
  float *qs = workspace.take(block), *ks = workspace.take(block), *vs = workspace.take(block);
  float *gs = workspace.take(block), *turned = workspace.take(block), *scaled = workspace.take(block);
  float *out = workspace.take(block), *out_t = workspace.take(block);
  float* scores = workspace.take(BLOCK * BLOCK);
  for (int64_t t = (tokens - 1) / BLOCK * BLOCK; t >= 0; t -= BLOCK) {
    const int64_t m = std::min<int64_t>(BLOCK, tokens - t), rows = round_up(m);
    pack(q.at(t), q.stride, m, width, qs, rows, dim);
    pack(k.at(t), k.stride, m, width, ks, rows, dim);
    pack(v.at(t), v.stride, m, width, vs, rows, dim);
    pack(d_o.at(t), d_o.stride, m, width, gs, rows, dim);

    // dv = Scores^T do + (K l^(m-1-j)) G
    transpose(ks, dim, turned, BLOCK, rows, dim);
    causal_scores(qs, turned, scores, decay.mask, rows, dim);
    anticausal_product(scores, gs, out, rows, dim, DROP);
    scale_rows(ks, scaled, decay.power + m - 1, -1, m, rows, dim);
    product(scaled, dim, 1, grad, dim, out, dim, rows, dim, dim, KEEP);
    unpack(out, dim, dv.at(t), dv.stride, m, width);

    // dk^T = Q^T dScores + G (V l^(m-1-j))^T, turned back at the end: cheaper than turning G
    transpose(vs, dim, turned, BLOCK, rows, dim);
    causal_scores(gs, turned, scores, decay.mask, rows, dim);
    anticausal_product_transposed(scores, qs, out_t, rows, dim, DROP);
    float to_end[BLOCK] = {};
    for (int64_t j = 0; j < m; j++) to_end[j] = decay.power[m - 1 - j];
    for (int64_t a = 0; a < dim; a++)
      for (int64_t j = 0; j < rows; j += VL)
        store(turned + a * BLOCK + j, load(turned + a * BLOCK + j) * load(to_end + j));
    product(grad, dim, 1, turned, BLOCK, out_t, BLOCK, dim, rows, dim, KEEP);
    transpose(out_t, BLOCK, out, dim, dim, rows);
    unpack(out, dim, dk.at(t), dk.stride, m, width);

    // G = l^m G + (Q l^(i+1))^T do
    scale_rows(qs, scaled, decay.power + 1, 1, m, rows, dim);
    product(scaled, 1, dim, gs, dim, grad, dim, dim, dim, m, Old::decayed(decay.slope * m));
  }
}

// One token: new = l S + k v^T and o = q new, columns [j, j + N*VL) of one head; the state is read and written once.
template <int N>
inline void decode_strip(const float* q, const float* k, const float* v, Old old, const float* state,
                         float* new_state, float* o, int64_t width) {
  vec acc[N] = {}, value[N];
  for (int n = 0; n < N; n++) value[n] = load(v + n * VL);
  for (int64_t i = 0; i < width; i++)
    for (int n = 0; n < N; n++) {
      vec x = load(state + i * width + n * VL);
      vec s = x * old.keep + (x * old.factor + k[i] * value[n]);
      store(new_state + i * width + n * VL, s);
      acc[n] += q[i] * s;
    }
  for (int n = 0; n < N; n++) store(o + n * VL, acc[n]);
}

void decode_head(const float* q, const float* k, const float* v, Old old, const float* state, float* new_state,
                 float* o, int64_t width) {
  int64_t j = 0;
  for (; j + 4 * VL <= width; j += 4 * VL)
    decode_strip<4>(q, k, v + j, old, state + j, new_state + j, o + j, width);
  for (; j + VL <= width; j += VL)
    decode_strip<1>(q, k, v + j, old, state + j, new_state + j, o + j, width);
  for (; j < width; j++) {
    float acc = 0.f;
    for (int64_t i = 0; i < width; i++) {
      float x = state[i * width + j];
      float s = x * old.keep + (x * old.factor + k[i] * v[j]);
      new_state[i * width + j] = s;
      acc += q[i] * s;
    }
    o[j] = acc;
  }
}

// ---- the C interface ----------------------------------------------------------------------------------------

struct Tokens {  // address and strides (in elements) of a (batch, heads, sequence, width) tensor, last stride 1
  int64_t address, batch_stride, head_stride, token_stride;

  template <typename T>
  Rows<T> head(int64_t b, int64_t h, int64_t token) const {
    return {reinterpret_cast<T*>(address) + b * batch_stride + h * head_stride + token * token_stride, token_stride};
  }
};

struct Call {  // mirrored by the argument list in kernels/cpu.py
  int64_t is_bf16, threads, heads, tokens, width;
  int64_t states;         // rows of the state tensors: batch, or number of packed sequences
  int64_t offsets;        // address of int64[states + 1] for packed sequences (batch 1), or 0
  int64_t slopes;         // address of double[heads]
  int64_t initial_state;  // address of float[states][heads][width][width] or 0
  int64_t state_out;      // forward: final states, written. backward: gradient of the final, replaced by that of the initial
  Tokens q, k, v, o, dq, dk, dv;  // forward: o is written. backward: o is its gradient, dq, dk, dv are written
};

class FlushDenormals {  // a decayed state full of denormal numbers would run a hundred times slower
#if defined(__SSE2__)
  unsigned saved = _mm_getcsr();

 public:
  FlushDenormals() { _mm_setcsr(saved | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved); }
#else
 public:
  FlushDenormals() {}
#endif
};

template <typename T>
void run_head(const Call& c, bool backward, int64_t task) {
  FlushDenormals flush;
  const int64_t row = task / c.heads, h = task % c.heads, width = c.width, dim = round_up(width);
  const int64_t* offsets = reinterpret_cast<const int64_t*>(c.offsets);
  const int64_t first = offsets ? offsets[row] : 0, tokens = (offsets ? offsets[row + 1] : c.tokens) - first;
  const int64_t b = offsets ? 0 : row;
  const Decay decay(reinterpret_cast<const double*>(c.slopes)[h]);
  const float* initial = reinterpret_cast<const float*>(c.initial_state);
  if (initial) initial += task * width * width;
  float* state_out = reinterpret_cast<float*>(c.state_out) + task * width * width;
  auto in = [&](const Tokens& t) { return t.head<const T>(b, h, first); };
  auto out = [&](const Tokens& t) { return t.head<T>(b, h, first); };

  workspace.reset(dim * dim + 16 * BLOCK * (dim + BLOCK));
  float* state = workspace.take(dim * dim);
  const size_t mark = workspace.used;
  if (!backward) {
    load_state(initial, width, state, dim, false);
    forward_head<T>(in(c.q), in(c.k), in(c.v), out(c.o), decay, state, tokens, width, dim);
  } else {
    // dq_t = do_t S_t^T: the forward recurrence with (do, v, k) for (q, k, v), on the transposed state.
    load_state(initial, width, state, dim, true);
    forward_head<T>(in(c.o), in(c.v), in(c.k), out(c.dq), decay, state, tokens, width, dim);
    workspace.used = mark;
    load_state(state_out, width, state, dim, false);
    backward_head<T>(in(c.q), in(c.k), in(c.v), in(c.o), out(c.dk), out(c.dv), decay, state, tokens, width, dim);
  }
  store_state(state, dim, state_out, width);
}

struct DecodeCall {  // mirrored by the argument list in kernels/cpu.py; states are float[batch][heads][width][width]
  int64_t is_bf16, threads, batch, heads, width, slopes, state, new_state;
  Tokens q, k, v, o;  // token_stride unused
};

template <typename T>
void run_decode(const DecodeCall& c, int64_t task) {
  FlushDenormals flush;
  const int64_t b = task / c.heads, h = task % c.heads, width = c.width, dim = round_up(width);
  workspace.reset(4 * dim);
  float *q = workspace.take(dim), *k = workspace.take(dim), *v = workspace.take(dim), *o = workspace.take(dim);
  pack(c.q.head<const T>(b, h, 0).data, 0, 1, width, q, 1, dim);
  pack(c.k.head<const T>(b, h, 0).data, 0, 1, width, k, 1, dim);
  pack(c.v.head<const T>(b, h, 0).data, 0, 1, width, v, 1, dim);
  const int64_t at = task * width * width;
  decode_head(q, k, v, Old::decayed(reinterpret_cast<const double*>(c.slopes)[h]),
              reinterpret_cast<const float*>(c.state) + at, reinterpret_cast<float*>(c.new_state) + at, o, width);
  unpack(o, dim, c.o.head<T>(b, h, 0).data, 0, 1, width);
}

void run(const Call& c, bool backward) {
  const int64_t tasks = c.states * c.heads;
  const int threads = int(std::min(c.threads, tasks));
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < tasks; task++) {
    if (c.is_bf16) run_head<bf16>(c, backward, task);
    else run_head<float>(c, backward, task);
  }
}

}  // namespace

extern "C" {

void lightning_forward(const int64_t* call) { run(*reinterpret_cast<const Call*>(call), false); }
void lightning_backward(const int64_t* call) { run(*reinterpret_cast<const Call*>(call), true); }

void lightning_decode(const int64_t* call) {
  const DecodeCall& c = *reinterpret_cast<const DecodeCall*>(call);
  const int64_t tasks = c.batch * c.heads;
  const int threads = int(std::min(c.threads, tasks));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < tasks; task++) {
    if (c.is_bf16) run_decode<bf16>(c, task);
    else run_decode<float>(c, task);
  }
}

}  // extern "C"
