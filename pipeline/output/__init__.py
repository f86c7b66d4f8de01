"""How an output holds its weights, and the pass over them that writes it."""
