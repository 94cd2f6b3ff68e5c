#include "tail.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "products.h"
#include "small.h"

namespace lowrank_kernels {
namespace {

constexpr double TINY = std::numeric_limits<double>::min();
// Members of a family that are tabulated, of which the one with the energy E is interpolated.
constexpr int64_t RATES = 32;
// Pivot of the unit rows of a block under which a row adds nothing but rounding to those before it.
constexpr double DEPENDENT = 0x1p-24;

struct Moments {
    at::Tensor energy, fourth;  // E = Σσ² and F = Σσ⁴
};

// How many values there are at most: the rank of B·Bᵀ where that is not full, else `count`.
at::Tensor count_of(const at::Tensor& gram, int64_t count) {
    const at::Tensor lengths = gram.diagonal(0, -2, -1).sqrt().clamp_min_(TINY);
    const at::Tensor unit = gram / lengths.unsqueeze(-1) / lengths.unsqueeze(-2);
    const at::Tensor pivots = inverse_factor(unit, DEPENDENT / 16, at::kDouble).diagonal(0, -2, -1).square().reciprocal_();
    const at::Tensor rank = pivots.gt(DEPENDENT).sum(-1).to(at::kDouble);
    return at::where(rank < gram.size(-1), rank.clamp_min(1), static_cast<double>(count));
}

// Estimates of both, no further apart than `count` values allow.
Moments moments(const at::Tensor& gram, const at::Tensor& count) {
    const at::Tensor diagonal = gram.diagonal(0, -2, -1);
    const int64_t s = gram.size(-1);
    const at::Tensor energy = diagonal.mean(-1), square = energy.square();
    if (s == 1) return {energy, square};
    const at::Tensor off_diagonal = gram.square().sum({-2, -1}) - diagonal.square().sum(-1);
    const at::Tensor beside = off_diagonal / static_cast<double>(s * (s - 1));
    return {energy, at::minimum(at::maximum(beside, square / count), square)};
}

struct Member {
    at::Tensor sum, spread;  // log Σx and log(Σx² / Σx⁴)
};

// Of the x = exp(−a·steps) whose log Σx² is `relative`, from a table over a.
Member of_energy(const at::Tensor& relative, const at::Tensor& steps, double first, double last) {
    const double slow = std::log(0.01 / last), fast = std::log(30 / first);
    const at::Tensor rates = at::cat({at::linspace(fast, slow, RATES - 1, steps.options()).exp_(), at::zeros({1}, steps.options())});
    const at::Tensor x = at::outer(rates, steps).neg_().exp_(), squares = x.square();
    const at::Tensor energies = squares.sum(-1).log_(), sums = x.sum(-1).log_();
    const at::Tensor spreads = energies - squares.square().sum(-1).log_();
    const at::Tensor above = at::searchsorted(energies, relative.contiguous()).clamp_(1, RATES - 1), below = above - 1;
    const at::Tensor low = energies.take(below), high = energies.take(above);
    const at::Tensor share = (relative - low).div_(high - low).clamp_(0, 1);
    const auto between = [&](const at::Tensor& values) { return at::lerp(values.take(below), values.take(above), share); };
    return {between(sums), between(spreads)};
}

// The same for one matrix on a CPU, of whose table only the rows that a search comes by are made.
struct One {
    double sum, spread;
};

One of_energy(double relative, const std::vector<double>& steps) {
    const double slow = std::log(0.01 / steps.back()), fast = std::log(30 / steps.front());
    struct Row {
        double energy, sum, spread;
    };
    const auto row = [&](int64_t number) {
        const double rate = number == RATES - 1 ? 0.0 : std::exp(fast + (slow - fast) * static_cast<double>(number) / (RATES - 2));
        double sum = 0, squares = 0, fourth = 0;
        for (const double step : steps) {
            const double x = std::exp(-rate * step), square = x * x;
            sum += x;
            squares += square;
            fourth += square * square;
        }
        return Row{std::log(squares), std::log(sum), std::log(squares) - std::log(fourth)};
    };
    int64_t below = 0, above = RATES - 1;  // energies grow with the number
    Row low = row(below), high = row(above);
    while (above - below > 1) {
        const int64_t middle = (below + above) / 2;
        const Row found = row(middle);
        (found.energy < relative ? low : high) = found;
        (found.energy < relative ? below : above) = middle;
    }
    const double share = std::clamp((relative - low.energy) / (high.energy - low.energy), 0.0, 1.0);
    return {low.sum + share * (high.sum - low.sum), low.spread + share * (high.spread - low.spread)};
}

double sum_after(double energy, double fourth, double least, int64_t count, int64_t known) {
    const auto h = static_cast<double>(known);
    const double square = least * least, relative = std::log(std::max(energy / std::max(square, TINY), TINY));
    const double spread = std::log(std::max(energy * square / std::max(fourth, TINY), TINY));
    std::vector<double> index(count), logarithms(count);
    for (int64_t i = 0; i < count; ++i) {
        index[i] = static_cast<double>(i + 1);
        logarithms[i] = h * std::log1p(index[i] / h);
    }
    const One cliff{relative, 0}, exponential = of_energy(relative, index), power = of_energy(relative, logarithms);
    double total = cliff.sum;
    for (const auto& [from, to] : {std::pair(cliff, exponential), std::pair(exponential, power)}) {
        total += std::clamp((spread - from.spread) / std::max(to.spread - from.spread, 1e-9), 0.0, 1.0) * (to.sum - from.sum);
    }
    return least * std::exp(total);
}

// Σσ over the `count` values from number `known` + 1 on, of those moments, `least` being number `known`.
at::Tensor sum_after(const Moments& tail, const at::Tensor& least, int64_t count, int64_t known) {
    if (least.dim() == 0 && least.is_cpu()) {
        const auto number = [](const at::Tensor& t) { return t.item<double>(); };
        return at::scalar_tensor(sum_after(number(tail.energy), number(tail.fourth), number(least), count, known), least.options());
    }
    const auto h = static_cast<double>(known), last = static_cast<double>(count);
    const at::Tensor square = least.square();
    const at::Tensor relative = tail.energy.div(square.clamp_min(TINY)).clamp_min_(TINY).log_();
    const at::Tensor spread = tail.energy.mul(square).div_(tail.fourth.clamp_min(TINY)).clamp_min_(TINY).log_();
    const at::Tensor index = at::arange(1, count + 1, relative.options());
    const Member cliff{relative, at::zeros_like(relative)}, exponential = of_energy(relative, index, 1, last);
    const Member power = of_energy(relative, index.div(h).log1p_().mul_(h), h * std::log1p(1 / h), h * std::log1p(last / h));
    at::Tensor total = cliff.sum;
    for (const auto& [from, to] : {std::pair(cliff, exponential), std::pair(exponential, power)}) {
        const at::Tensor part = (spread - from.spread).div_((to.spread - from.spread).clamp_min_(1e-9)).clamp_(0, 1);
        total = total + part * (to.sum - from.sum);
    }
    return least * total.exp_();
}

}  // namespace

at::Tensor tail_weights(const at::Tensor& block, const at::Tensor& sigma, int64_t count, int64_t anchor) {
    const int64_t h = sigma.size(-1);
    const at::Tensor unit = peak_of(block).clamp_min(TINY);
    const at::Tensor scaled = block.to(at::kDouble) / unit.unsqueeze(-1).unsqueeze(-1);
    const at::Tensor gram = at::matmul(scaled, scaled.mT()), at_most = count_of(gram, count);
    const Moments tail = moments(gram, at_most);
    const at::Tensor known = sigma.to(at::kDouble).div(unit.unsqueeze(-1)), after = known.narrow(-1, anchor, h - anchor);
    const at::Tensor squares = after.square();
    const Moments from_anchor{tail.energy + squares.sum(-1), tail.fourth + squares.square().sum(-1)};
    const at::Tensor sum = sum_after(from_anchor, known.select(-1, anchor - 1), count + h - anchor, anchor) - after.sum(-1);
    const at::Tensor least = tail.energy * tail.energy.div(tail.fourth.clamp_min(TINY)).sqrt_();
    const at::Tensor total = at::minimum(at::maximum(sum, least), tail.energy.mul(at_most).sqrt_());
    const at::Tensor real = tail.energy > 0;  // not where G is zero, or not finite
    const at::Tensor effective = at::where(real, total.square().div_(tail.energy), 0.0);
    const at::Tensor weight = at::where(real, tail.energy.div(total).mul_(unit), 0.0);
    const at::Tensor share = effective.unsqueeze(-1).sub(at::arange(count, effective.options())).clamp_(0, 1);
    return share.mul_(weight.unsqueeze(-1)).to(sigma.scalar_type());
}

}  // namespace lowrank_kernels
