// The field on the surface by conjugate gradients on a CPU: one scene per task, all of it in the second-level cache.
//
// Letters: L snapshots, M antennas, N = V H elements, P fields of a scene. A field is planar, [re: wide_n | im: wide_n]
// with zeros beyond N; so are the codes of a snapshot. Formulas are those of reference.py; scenes are independent, so the
// bits do not depend on the number of threads.
#include <cmath>
#include <limits>

#include "native/product.hpp"
#include "native/scratch.hpp"

namespace RIS_NS {
namespace field {

struct Sizes {
    int64_t antennas, snapshots, rows, columns, fields;  // M, L, V, H, P
    bool shaped;                                         // by a root of the prior covariance
    int64_t elements() const { return rows * columns; }
};

template <class T> struct Scratch {
    Sizes z;
    int64_t wide_n, wide_m, wide_h;  // lengths of rows over N, 2 M and H, in whole vectors
    float* block = nullptr;
    T *rows_m, *rows_n;  // H: re over im (2 M, wide_n), and its transpose (N, wide_m)
    T *codes, *coded;    // (L, 2 wide_n)
    T *parts, *sent;     // (2 L, wide_m)
    T *weights, *residual, *direction, *image, *rooted;  // (P, 2 wide_n)
    T* energy;                                           // (P)
    T *across, *down;        // the factors of the root: (2 H, 2 wide_h), (2 V, 2 V)
    T *grid, *half, *whole;  // a field on its way through them: (V, 2 H), (V, 2 wide_h), (2 V, wide_h)

    explicit Scratch(const Sizes& sizes)
        : z(sizes), wide_n(round_up(sizes.elements(), lanes<T>)), wide_m(round_up(2 * sizes.antennas, lanes<T>)),
          wide_h(round_up(sizes.columns, lanes<T>)) {
        block = allocate(*this, true);
    }
    ~Scratch() { std::free(block); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    void cut(Cutter& c) {
        c.part(rows_m, 2 * z.antennas * wide_n);
        c.part(rows_n, z.elements() * wide_m);
        T **sets[] = {&codes, &coded}, **received[] = {&parts, &sent};
        T** fields[] = {&weights, &residual, &direction, &image, &rooted};
        for (T** each : sets) c.part(*each, 2 * z.snapshots * wide_n);
        for (T** each : received) c.part(*each, 2 * z.snapshots * wide_m);
        for (T** each : fields) c.part(*each, 2 * z.fields * wide_n);
        c.part(energy, z.fields);
        c.part(across, z.shaped ? 4 * z.columns * wide_h : 0);
        c.part(down, z.shaped ? 4 * z.rows * z.rows : 0);
        c.part(grid, z.shaped ? 2 * z.elements() : 0);
        c.part(half, z.shaped ? 2 * z.rows * wide_h : 0);
        c.part(whole, z.shaped ? 2 * z.rows * wide_h : 0);
    }
};

// n complex numbers, interleaved, into a plane of re and one of im.
template <class T> inline void planes(T* re, T* im, const T* from, int64_t n) {
    constexpr int W = lanes<T>;
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        Vec<T> even, odd;
        split<T>(load(from + 2 * i), load(from + 2 * i + W), even, odd);
        store(re + i, even);
        store(im + i, odd);
    }
    for (; i < n; ++i) re[i] = from[2 * i], im[i] = from[2 * i + 1];
}

template <class T> inline T inner(const T* a, const T* b, int64_t n) {
    Vec<T> total = {};
    for (int64_t i = 0; i < n; i += lanes<T>) total += load(a + i) * load(b + i);
    return sum<T>(total);
}

template <class T> inline void add(T* to, T scale, const T* from, int64_t n) {
    for (int64_t i = 0; i < n; i += lanes<T>) store(to + i, load(to + i) + scale * load(from + i));
}

template <class T> inline T at_least_tiny(T x) {  // NaN stays NaN
    const T tiny = std::numeric_limits<T>::min();
    return x < tiny ? tiny : x;
}

// The two factors of the root, complex and interleaved, as real matrices: `across` multiplies rows [re | im], `down`
// is multiplied by columns in which re and im alternate.
template <class T> void load_root(const Scratch<T>& s, const T* vertical, const T* horizontal) {
    const int64_t v = s.z.rows, h = s.z.columns, wide = s.wide_h;
    for (int64_t i = 0; i < h; ++i)
        for (int64_t j = 0; j < h; ++j) {
            const T re = horizontal[2 * (i * h + j)], im = horizontal[2 * (i * h + j) + 1];
            T *of_re = s.across + 2 * j * wide + i, *of_im = of_re + 2 * h * wide;
            of_re[0] = of_im[wide] = re;
            of_re[wide] = im;
            of_im[0] = -im;
        }
    for (int64_t i = 0; i < v; ++i)
        for (int64_t j = 0; j < v; ++j) {
            const T re = vertical[2 * (i * v + j)], im = vertical[2 * (i * v + j) + 1];
            T *to_re = s.down + 2 * (i * v + j), *to_im = to_re + 2 * v * v;
            to_re[0] = to_im[1] = re;
            to_re[1] = -im;
            to_im[0] = im;
        }
}

// C^(1/2) times every field.
template <class T> void root(const Scratch<T>& s, T* to, const T* from) {
    const int64_t v = s.z.rows, h = s.z.columns, wide = s.wide_h;
    if (!s.z.shaped) {
        std::memcpy(to, from, size_t(2 * s.z.fields * s.wide_n) * sizeof(T));
        return;
    }
    for (int64_t plane = 0; plane < 2 * s.z.fields; plane += 2) {
        for (int64_t part = 0; part < 2; ++part)
            for (int64_t i = 0; i < v; ++i)
                for (int64_t j = 0; j < h; ++j) s.grid[(2 * i + part) * h + j] = from[(plane + part) * s.wide_n + i * h + j];
        product(s.half, v, 2 * wide, s.grid, 2 * h, int64_t(1), s.across, 2 * h);
        product(s.whole, 2 * v, wide, s.down, 2 * v, int64_t(1), s.half, 2 * v);
        for (int64_t part = 0; part < 2; ++part) {
            T* out = to + (plane + part) * s.wide_n;
            for (int64_t i = 0; i < v; ++i)
                for (int64_t j = 0; j < h; ++j) out[i * h + j] = s.whole[(part * v + i) * wide + j];
            for (int64_t i = v * h; i < s.wide_n; ++i) out[i] = 0;  // a NaN of another scene may stand there
        }
    }
}

// c_l o x into `coded`, x the field of each snapshot or the one of all.
template <class T> void encode(const Scratch<T>& s, const T* fields) {
    const int64_t wide = s.wide_n;
    for (int64_t l = 0; l < s.z.snapshots; ++l) {
        const T *x = fields + (s.z.fields == 1 ? 0 : 2 * l * wide), *c = s.codes + 2 * l * wide;
        T* to = s.coded + 2 * l * wide;
        for (int64_t i = 0; i < wide; i += lanes<T>) {
            const Vec<T> cr = load(c + i), ci = load(c + wide + i), xr = load(x + i), xi = load(x + wide + i);
            store(to + i, cr * xr - ci * xi);
            store(to + wide + i, cr * xi + ci * xr);
        }
    }
}

// conj(c_l) o `coded`, of each snapshot or the sum of all.
template <class T> void decode(const Scratch<T>& s, T* fields) {
    const int64_t wide = s.wide_n, each = s.z.snapshots / s.z.fields;
    for (int64_t p = 0; p < s.z.fields; ++p)
        for (int64_t i = 0; i < wide; i += lanes<T>) {
            Vec<T> re = {}, im = {};
            for (int64_t l = p * each; l < (p + 1) * each; ++l) {
                const T *c = s.codes + 2 * l * wide + i, *x = s.coded + 2 * l * wide + i;
                const Vec<T> cr = load(c), ci = load(c + wide), xr = load(x), xi = load(x + wide);
                re += cr * xr + ci * xi;
                im += cr * xi - ci * xr;
            }
            store(fields + 2 * p * wide + i, re);
            store(fields + (2 * p + 1) * wide + i, im);
        }
}

// C^(1/2) G^H y; y_l stands twice in `sent`, as [re | im] and as [im | -re], the rows that make re and im of H^H y_l.
template <class T> void adjoint(const Scratch<T>& s, T* fields) {
    product(s.coded, 2 * s.z.snapshots, s.wide_n, s.sent, s.wide_m, int64_t(1), s.rows_m, 2 * s.z.antennas);
    decode(s, s.rooted);
    root(s, fields, s.rooted);
}

// C^(1/2) G^H G C^(1/2) x.
template <class T> void normal(const Scratch<T>& s, T* to, const T* fields) {
    const int64_t antennas = s.z.antennas;
    root(s, s.rooted, fields);
    encode(s, s.rooted);
    product(s.parts, 2 * s.z.snapshots, s.wide_m, s.coded, s.wide_n, int64_t(1), s.rows_n, s.z.elements());
    for (int64_t l = 0; l < s.z.snapshots; ++l) {
        const T *of_re = s.parts + 2 * l * s.wide_m, *of_im = of_re + s.wide_m;
        T *y = s.sent + 2 * l * s.wide_m, *turned = y + s.wide_m;
        for (int64_t m = 0; m < antennas; ++m) {
            const T re = of_re[m] - of_im[antennas + m], im = of_re[antennas + m] + of_im[m];
            y[m] = re;
            y[antennas + m] = turned[m] = im;
            turned[antennas + m] = -re;
        }
    }
    adjoint(s, to);
}

template <class T> void load_channel(const Scratch<T>& s, const T* channel) {
    const int64_t n = s.z.elements(), antennas = s.z.antennas;
    for (int64_t m = 0; m < antennas; ++m)
        planes(s.rows_m + m * s.wide_n, s.rows_m + (antennas + m) * s.wide_n, channel + 2 * m * n, n);
    for (int64_t i = 0; i < n; ++i)
        for (int64_t m = 0; m < 2 * antennas; ++m) s.rows_n[i * s.wide_m + m] = s.rows_m[m * s.wide_n + i];
}

template <class T> void load_snapshots(const Scratch<T>& s, const T* snapshots) {
    const int64_t antennas = s.z.antennas;
    for (int64_t l = 0; l < s.z.snapshots; ++l) {
        T *y = s.sent + 2 * l * s.wide_m, *turned = y + s.wide_m;
        planes(y, y + antennas, snapshots + 2 * l * antennas, antennas);
        for (int64_t m = 0; m < antennas; ++m) turned[m] = y[antennas + m], turned[antennas + m] = -y[m];
    }
}

template <class T> void load_codes(const Scratch<T>& s, const T* codes) {
    const int64_t n = s.z.elements();
    for (int64_t l = 0; l < s.z.snapshots; ++l)
        planes(s.codes + 2 * l * s.wide_n, s.codes + (2 * l + 1) * s.wide_n, codes + 2 * l * n, n);
}

// The estimate of one scene, (N, P, 2) interleaved.
template <class T> void solve(const Scratch<T>& s, T* out, const T* channel, const T* snapshots, T snr_db, int64_t steps) {
    const int64_t fields = s.z.fields, size = 2 * s.wide_n;
    load_channel(s, channel);
    load_snapshots(s, snapshots);
    const T power = inner(s.rows_m, s.rows_m, 2 * s.z.antennas * s.wide_n);
    const T ridge = power / (T(s.z.antennas) * T(std::pow(10.0, double(snr_db) / 10.0)));
    adjoint(s, s.residual);
    std::memset(s.weights, 0, size_t(fields * size) * sizeof(T));
    std::memcpy(s.direction, s.residual, size_t(fields * size) * sizeof(T));
    for (int64_t p = 0; p < fields; ++p) s.energy[p] = inner(s.residual + p * size, s.residual + p * size, size);
    for (int64_t step = 0; step < steps; ++step) {
        normal(s, s.image, s.direction);
        add(s.image, ridge, s.direction, fields * size);
        for (int64_t p = 0; p < fields; ++p) {
            T *direction = s.direction + p * size, *image = s.image + p * size, *residual = s.residual + p * size;
            const T length = s.energy[p] / at_least_tiny(inner(direction, image, size));
            add(s.weights + p * size, length, direction, size);
            add(residual, -length, image, size);
            const T energy = inner(residual, residual, size), ratio = energy / at_least_tiny(s.energy[p]);
            for (int64_t i = 0; i < size; i += lanes<T>) store(direction + i, load(residual + i) + ratio * load(direction + i));
            s.energy[p] = energy;
        }
    }
    root(s, s.rooted, s.weights);
    for (int64_t i = 0; i < s.z.elements(); ++i)
        for (int64_t plane = 0; plane < 2 * fields; ++plane) out[2 * i * fields + plane] = s.rooted[plane * s.wide_n + i];
}

// Every scene. own_codes: a set for each. Returns 0, or 1 without memory.
template <class T>
int run(T* out, const T* channel, const T* codes, const T* snapshots, const T* snr_db, const T* vertical, const T* horizontal,
        int64_t batch, int64_t antennas, int64_t length, int64_t rows, int64_t columns, int64_t fields, int64_t own_codes, int64_t steps) {
    const Sizes z{antennas, length, rows, columns, fields, vertical != nullptr};
    const int64_t n = z.elements();
    int failed = 0;
#pragma omp parallel if (batch > 1)
    {
        const Scratch<T> s(z);
        if (s.block && z.shaped) load_root(s, vertical, horizontal);
        if (s.block && !own_codes) load_codes(s, codes);
#pragma omp for schedule(static) nowait
        for (int64_t b = 0; b < batch; ++b) {
            if (!s.block) {
#pragma omp atomic write
                failed = 1;
                continue;
            }
            if (own_codes) load_codes(s, codes + 2 * b * length * n);
            solve(s, out + 2 * b * n * fields, channel + 2 * b * antennas * n, snapshots + 2 * b * length * antennas, snr_db[b], steps);
        }
    }
    return failed;
}

}  // namespace field
}  // namespace RIS_NS

// out (B, N, P, 2), channel (B, M, N, 2), codes ([B,] L, N, 2), snapshots (B, L, M, 2), snr_db (B); the factors of the root
// (V, V, 2) and (H, H, 2), or null twice, then with any V H = N. P is 1 or L.
#define RIS_FIELD(name, T)                                                                                                      \
    RIS_EXPORT(int, name)                                                                                                       \
    (T * out, const T* channel, const T* codes, const T* snapshots, const T* snr_db, const T* vertical, const T* horizontal,    \
     int64_t batch, int64_t antennas, int64_t length, int64_t rows, int64_t columns, int64_t fields, int64_t own_codes,         \
     int64_t steps) {                                                                                                           \
        return RIS_NS::field::run<T>(out, channel, codes, snapshots, snr_db, vertical, horizontal, batch, antennas, length,     \
                                     rows, columns, fields, own_codes, steps);                                                  \
    }
RIS_FIELD(aperture_field_f32, float)
RIS_FIELD(aperture_field_f64, double)
