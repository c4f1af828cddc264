"""The engine room: a call, its plan and its rows, the loops over chunks, and their autograd wrapping."""
