"""The second path: each kind's formula once more, in float64, plainly and from the papers.

Nothing here knows `deltas/`, the binding or our reader of adapters: what verification recomputes shares no
line with what wrote the weights but the decoding of the base's rows. Slow is fine, whole matrices are fine.
"""
