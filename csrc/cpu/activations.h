// Activations on vectors of float, included by AVX files inside their namespace. V adds: sub, mul, div, abs, min, max, round, pow2,
// less_select (a < b ? yes : no), times_pow2 (v * 2^n for n from -200 to 0, which may be 0 where n < -126).

// e^x to about 1 ulp for x in [-87, 88], 0 below and infinity above (Cephes expf); NaN stays NaN.
template <class V>
inline typename V::F vector_exp(typename V::F exact) {
  using F = typename V::F;
  const F low = V::set1(-87.0f), high = V::set1(88.0f);
  const F x = V::max(low, V::min(high, exact));
  const F n = V::round(V::mul(x, V::set1(1.44269504088896341f)));
  F r = V::fma(n, V::set1(-0.693359375f), x);
  r = V::fma(n, V::set1(2.12194440e-4f), r);
  F p = V::set1(1.9875691500e-4f);
  p = V::fma(p, r, V::set1(1.3981999507e-3f));
  p = V::fma(p, r, V::set1(8.3334519073e-3f));
  p = V::fma(p, r, V::set1(4.1665795894e-2f));
  p = V::fma(p, r, V::set1(1.6666665459e-1f));
  p = V::fma(p, r, V::set1(5.0000001201e-1f));
  p = V::fma(V::mul(r, r), p, V::add(r, V::set1(1.0f)));
  p = V::less_select(exact, low, V::zero(), V::mul(p, V::pow2(n)));
  return V::less_select(high, exact, V::set1(__builtin_inff()), p);
}

// 2^x for x <= 0, which may be 0 below -126; NaN stays NaN. 2^n * 2^f with f in [-1/2, 1/2]: Taylor to a power of 6, below 1e-7
// relative, or of 4, below 5e-5.
template <class V, int power = 6>
inline typename V::F vector_exp2_nonpositive(typename V::F exact) {
  using F = typename V::F;
  const F x = V::max(V::set1(-200.0f), exact), n = V::round(x), f = V::sub(x, n);
  F p = V::set1(9.6181291e-3f);
  if constexpr (power == 6) p = V::fma(V::fma(V::set1(1.5403530e-4f), f, V::set1(1.3333558e-3f)), f, p);
  p = V::fma(p, f, V::set1(5.5504109e-2f));
  p = V::fma(p, f, V::set1(2.4022651e-1f));
  p = V::fma(p, f, V::set1(6.9314718e-1f));
  p = V::fma(p, f, V::set1(1.0f));
  return V::times_pow2(p, n);
}

// x * Phi(x) = x/2 * (1 + erf(x / sqrt 2)). erf by two polynomials (N. Juffa's erff, about 1 ulp): near zero a * P(a^2), beyond it
// 1 - exp(Q(|a|)), whose exponential gives the negative tail 1 + erf(a) without cancellation.
template <class V>
inline typename V::F vector_gelu(typename V::F x) {
  using F = typename V::F;
  const F a = V::mul(x, V::set1(0.70710678118654752f));
  const F t = V::min(V::set1(9.0f), V::abs(a)), s = V::mul(t, t);  // erf is 1 in float long before 9
  F near = V::set1(-5.96761703e-4f);
  near = V::fma(near, s, V::set1(4.99119423e-3f));
  near = V::fma(near, s, V::set1(-2.67681349e-2f));
  near = V::fma(near, s, V::set1(1.12819925e-1f));
  near = V::fma(near, s, V::set1(-3.76125336e-1f));
  near = V::fma(near, s, V::set1(1.28379166e-1f));
  near = V::add(V::fma(near, a, a), V::set1(1.0f));  // 1 + erf(a)
  F far = V::fma(V::set1(-1.72853470e-5f), t, V::set1(3.83197126e-4f));
  far = V::fma(far, s, V::fma(V::set1(-3.88396438e-3f), t, V::set1(2.42546219e-2f)));
  far = V::fma(far, t, V::set1(-1.06777877e-1f));
  far = V::fma(far, t, V::set1(-6.34846687e-1f));
  far = V::fma(far, t, V::set1(-1.28717512e-1f));
  far = vector_exp<V>(V::fma(far, t, V::sub(V::zero(), t)));  // 1 - erf(|a|)
  far = V::less_select(a, V::zero(), far, V::sub(V::set1(2.0f), far));
  const F one_plus_erf = V::less_select(t, V::set1(0.927734375f), near, far);
  return V::mul(V::mul(x, V::set1(0.5f)), one_plus_erf);
}

// x / (1 + e^-u): silu with u = x; gelu_tanh with u = 2 sqrt(2/pi) (x + 0.044715 x^3), since (1 + tanh v) / 2 = 1 / (1 + e^-2v).
template <class V>
inline typename V::F vector_gate(typename V::F x, typename V::F minus_u) {
  return V::div(x, V::add(V::set1(1.0f), vector_exp<V>(minus_u)));
}

template <class V>
inline typename V::F vector_activate(typename V::F x, Activation activation) {
  using F = typename V::F;
  switch (activation) {
    case Activation::relu:
      return V::max(V::zero(), x);
    case Activation::gelu:
      return vector_gelu<V>(x);
    case Activation::gelu_tanh: {
      const F cubic = V::fma(V::mul(x, x), V::set1(-2.0f * 0.79788456080286536f * 0.044715f), V::set1(-2.0f * 0.79788456080286536f));
      return vector_gate<V>(x, V::mul(x, cubic));
    }
    case Activation::silu:
      return vector_gate<V>(x, V::sub(V::zero(), x));
    default:
      return x;
  }
}
