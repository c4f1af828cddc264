"""The engine room: execution plans, the backends' row functions and GEMMs, and their autograd wrapping."""
