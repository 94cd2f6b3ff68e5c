#include "small.h"

#include <ATen/Parallel.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>

#include "philox.h"
#if defined(LOWRANK_KERNELS_CUDA)
#include "cuda/binding.h"
#endif

namespace lowrank_kernels {
namespace {

// Words 0 … count − 1 of each seed's stream, scaled as `philox::unit23` or `philox::unit32`, into out (seeds, count) fp32.
template <float (*SCALE)(uint32_t)>
at::Tensor uniform(at::IntArrayRef seeds, int64_t count, uint32_t stream) {
    at::Tensor out = at::empty({static_cast<int64_t>(seeds.size()), count}, at::kFloat);
    float* const values = out.mutable_data_ptr<float>();
    const int64_t blocks = (count + 3) / 4;
    for (size_t row = 0; row < seeds.size(); ++row) {
        const auto seed = static_cast<uint64_t>(seeds[row]);
        float* const to = values + row * count;
        at::parallel_for(0, blocks, 2048, [&](int64_t begin, int64_t end) {
            for (int64_t block = begin; block < end; ++block) {
                const auto words = philox::words(seed, stream, static_cast<uint64_t>(block));
                for (int64_t lane = 0; lane < std::min<int64_t>(4, count - 4 * block); ++lane) {
                    to[4 * block + lane] = SCALE(words.value[lane]);
                }
            }
        });
    }
    return out;
}

}  // namespace

at::Tensor inverse_factor(const at::Tensor& gram, double shift, at::ScalarType dtype) {
#if defined(LOWRANK_KERNELS_CUDA)
    if (gram.is_cuda()) {
        if (auto inverse = cuda::inverse_factor(gram, shift, dtype)) return *inverse;
    }
#endif
    const at::Tensor identity = at::eye(gram.size(-1), gram.options());
    auto [factor, failed] = at::linalg_cholesky_ex(shift == 0 ? gram : gram + shift * identity);
    factor = at::where((failed != 0).unsqueeze(-1).unsqueeze(-1), identity, factor);
    return at::linalg_solve_triangular(factor, identity.expand_as(factor), /*upper=*/false).to(dtype);
}

at::Tensor normal(int64_t seed, at::IntArrayRef shape, uint32_t stream, const at::TensorOptions& options) {
    return normals(seed, shape, stream, options).squeeze(0);
}

at::Tensor normals(at::IntArrayRef seeds, at::IntArrayRef shape, uint32_t stream, const at::TensorOptions& options) {
    std::vector<int64_t> sizes{static_cast<int64_t>(seeds.size())};
    sizes.insert(sizes.end(), shape.begin(), shape.end());
    const int64_t count = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
#if defined(LOWRANK_KERNELS_CUDA)
    if (options.device().is_cuda()) return cuda::normal(seeds, count, stream, options).reshape(sizes);
#endif
    const at::Tensor unit = uniform<philox::unit23>(seeds, count + count % 2, stream);
    const at::Tensor radius = unit.slice(-1, 0, std::nullopt, 2).log().mul_(-2.0).sqrt_();
    const at::Tensor angle = unit.slice(-1, 1, std::nullopt, 2) * (2.0 * M_PI);
    at::Tensor pairs = at::empty_like(unit);
    at::Tensor first = pairs.slice(-1, 0, std::nullopt, 2), second = pairs.slice(-1, 1, std::nullopt, 2);
    at::mul_out(first, angle.cos(), radius);
    at::mul_out(second, angle.sin(), radius);
    return pairs.slice(-1, 0, count).to(options.device(), options.dtype().toScalarType()).reshape(sizes);
}

at::Tensor gumbel(at::IntArrayRef seeds, int64_t count, uint32_t stream, const at::Device& device) {
#if defined(LOWRANK_KERNELS_CUDA)
    if (device.is_cuda()) return cuda::gumbel(seeds, count, stream, device);
#endif
    at::Tensor unit = uniform<philox::unit32>(seeds, count, stream);
    return unit.clamp_max_(1.0 - 0x1p-24).neg_().log1p_().neg_().log_().neg_().to(device);
}

at::Tensor sample_importance(const at::Tensor& sigma, int64_t rank, at::IntArrayRef seeds) {
    constexpr double tiny = std::numeric_limits<double>::min();
    const at::Tensor weights = sigma.to(at::kDouble);
    const at::Tensor keys = weights.div(weights.amax(-1, true).clamp_min_(tiny)).clamp_min_(tiny).log_();
    const at::Tensor noisy = keys + gumbel(seeds, sigma.size(-1), philox::GUMBEL, sigma.device());
    const at::Tensor chosen = std::get<0>(std::get<1>(noisy.topk(rank, -1)).sort(-1));
    const at::Tensor order = std::get<1>(sigma.gather(-1, chosen).sort(/*stable=*/true, -1, /*descending=*/true));
    return chosen.gather(-1, order);
}

}  // namespace lowrank_kernels
