"""The quadratic model: closed forms, spectra and simulation, in NumPy and SciPy alone."""
