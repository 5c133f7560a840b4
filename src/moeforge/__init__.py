"""moeforge: build, train, inspect and run Mixture-of-Experts models on one set of parts."""

__version__ = "0.1.0"
