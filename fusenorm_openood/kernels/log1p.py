"""The logarithm near 1, as the kernels compute it."""

# numba's cache does not see a change here: change cpu.py with it.
# log(1 + r) = r - r^2/2 + r^3 (c0 + c1 r + ... + c6 r^6) for sqrt(1/2) <= 1 + r <= sqrt(2), with
# relative errors below 2e-7: numpy's Chebyshev fit to 400 Chebyshev nodes, in powers of r.
COEFFICIENTS = (
    0.3333340883255005,
    -0.2500092089176178,
    0.19985127449035645,
    -0.16592855751514435,
    0.14676396548748016,
    -0.1411842554807663,
    0.09272214025259018,
)
