// Newtonized orthogonal matching pursuit with elimination (search.py) of a batch of scenes: network inputs and factor
// columns, one scene at a time per thread.
//
// Everything of a scene stays in the thread's scratch: P = G^H G and its images in the second-level cache for small
// arrays; for large ones G is applied through H and the codes and nothing of N x N exists. A scene goes through the
// same operations in the same order whatever the batch and the number of threads, so its bits are its own.
#include "answer.hpp"

// inputs (B, width) and basis (B, N, 2 rank) from snapshots (B, L, M, 2), channel (B, M, N, 2), codes (L, N, 2), or
// (B, L, N, 2) where own_codes is 1, snr in dB (B), and the constants of the geometry: x, y, curvature (N), scale, low, high, trust (3), grid (G, 3), dictionary
// (2 N, 2 G), which may be null where the grid has factors. wavenumber 0: Fresnel. dense: 1 to form P, 0 to go through H, -1 to choose.
// Returns 0, 1 if there was no memory for scratch, or 2 if there is neither a dictionary nor a grid with factors.
RIS_EXPORT(int, pursuit_features)
(float* inputs, float* basis, const float* snapshots, const float* channel, const float* codes, const float* snr_db, const float* x,
 const float* y, const float* curvature, const float* scale, const float* low, const float* high, const float* trust, const float* grid,
 const float* dictionary, float wavenumber, int64_t batch, int64_t antennas, int64_t elements, int64_t n_snapshots, int64_t atoms,
 int64_t positions, int64_t dense, int64_t own_codes) {
    using namespace RIS_NS::pursuit;
    const int64_t wide = padded(elements), lp = padded(n_snapshots), rounds = 2 * atoms * (atoms + 1);
    const bool small = elements <= 256 && elements * (antennas + rounds) <= antennas * n_snapshots * rounds;
    const Geometry g{x, y, curvature, scale, low, high, trust, grid, dictionary, elements, positions, wavenumber};
    const Shared shared({antennas, elements, n_snapshots, atoms, positions, wide, lp, dense < 0 ? small : dense > 0, 0, own_codes > 0}, g, codes);
    const Sizes& z = shared.z;
    int failed = !shared.block;
    if (failed) return 1;
    if (!shared.factors.nu && !dictionary) return 2;
#pragma omp parallel if (batch > 1)
    {
        const Scratch s(z);
#pragma omp for schedule(dynamic, 4) nowait
        for (int64_t b = 0; b < batch; ++b) {
            if (!s.block) {
#pragma omp atomic write
                failed = 1;
                continue;
            }
            if (own_codes) s.codes.fill(codes + 2 * b * n_snapshots * elements, z);
            Scene scene{snapshots + 2 * b * n_snapshots * antennas, channel + 2 * b * antennas * elements, own_codes ? s.codes : shared.codes,
                        clamp(snr_db[b], LEAST_DB, MOST_DB), 0, 0, 0, 0, 0, 0, 0};
            normal_equations(s, scene);
            pursue(s, shared, scene);
            RIS_NS::pursuit::inputs(inputs + b * z.width(), s, g, scene);
            RIS_NS::pursuit::basis(basis + 2 * b * elements * z.rank(), s, shared);
        }
    }
    return failed;
}
