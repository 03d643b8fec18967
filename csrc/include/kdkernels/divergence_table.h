// The divergences the kernels know; included inside a namespace, or a class, that says what an entry is.
#define KDK_ENTRY(FUNCTOR, NAME) general<FUNCTOR>(NAME),
static constexpr Divergence kDivergences[] = {
    linear("forward_kl", {1, -1, 0, 0}),
    linear("reverse_kl", {0, 0, -1, 1}),
    linear("jeffreys", {1, -1, -1, 1}),
    linear("soft_ce", {0, -1, 0, 0}),
    linear("dual_soft_ce", {0, 0, -1, 0}),
    KDK_FUNCTORS(KDK_ENTRY)
#if defined(KDK_WITH_OUTER)
        general<LkNegativeLog>("lk_nla"),
    general<LkHybrid>("lk_hybrid"),
#endif
};
#undef KDK_ENTRY
static constexpr int kNumDivergences = int(sizeof(kDivergences) / sizeof(kDivergences[0]));

// The entry that computes a divergence at given parameters: limits, and what is near them, have entries of their own.
static inline const char* entry_name(const char* name, double x0, double x1) {
  if (std::strcmp(name, "alpha_beta") != 0) return name;
  const auto near = [](double x) { return x > -0.125 && x < 0.125; };
  if (x0 == 0 && x1 == 0) return "alpha_beta/a=b=0";
  if (x0 == 0 && !near(x1)) return "alpha_beta/a=0";
  if (x1 == 0 && !near(x0)) return "alpha_beta/b=0";
  if (x0 + x1 == 0 && !near(x0)) return "alpha_beta/a+b=0";
  // A negative parameter too makes large terms of different signs.
  return x0 < 0.125 || x1 < 0.125 ? "alpha_beta/near" : name;
}
