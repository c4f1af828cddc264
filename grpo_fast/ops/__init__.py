"""The engine room: one call of the LM head, its plan, its passes over chunks of rows, and what autograd sees of it."""
