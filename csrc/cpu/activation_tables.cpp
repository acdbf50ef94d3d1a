// The numbers of ActivationTable: S at the Chebyshev nodes of each piece, by a polynomial through them.
#include <cmath>

#include "kernels.h"

namespace sparse_prune {
namespace {

template <int powers, class S>
ActivationTable<powers> fit(double piece, const S& s) {  // piece: its width in a
  constexpr double kPi = 3.14159265358979323846;
  ActivationTable<powers> table = {};
  table.per_unit = static_cast<float>(1 / piece);
  table.limit = static_cast<float>(31 * piece);
  double nodes[powers], divided[powers];
  for (int k = 0; k < powers; ++k) nodes[k] = 0.5 * std::cos((2 * k + 1) * kPi / (2 * powers));
  for (int n = 0; n < 31; ++n) {
    for (int k = 0; k < powers; ++k) divided[k] = s((n + nodes[k]) / table.per_unit);
    for (int order = 1; order < powers; ++order)
      for (int k = powers - 1; k >= order; --k) divided[k] = (divided[k] - divided[k - 1]) / (nodes[k] - nodes[k - order]);
    double sum[powers + 1] = {};  // Newton's form, multiplied out
    for (int k = powers - 1; k >= 0; --k) {
      for (int j = powers; j > 0; --j) sum[j] = sum[j - 1] - nodes[k] * sum[j];
      sum[0] = divided[k] - nodes[k] * sum[0];
    }
    for (int j = 0; j < powers; ++j) table.power[j][n] = static_cast<float>(sum[j]);
  }
  return table;
}

double lower_tail(double a) { return 0.5 * std::erfc(a * 0.70710678118654752440); }
double gate(double u) { return 1 / (1 + std::exp(u)); }
double tanh_tail(double a) { return gate(2 * 0.79788456080286535588 * (a + 0.044715 * a * a * a)); }

}  // namespace

const ActivationTable<8> gelu_table = fit<8>(0.25, lower_tail);
const ActivationTable<4> gelu_table_bf16 = fit<4>(0.18, lower_tail);
const ActivationTable<4> gelu_tanh_table_bf16 = fit<4>(0.18, tanh_tail);
const ActivationTable<4> silu_table_bf16 = fit<4>(0.6, gate);

}  // namespace sparse_prune
