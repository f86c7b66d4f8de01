"""What an adapter's keys and config mean for a checkpoint's weights, worked out a second time and otherwise.

Verification holds the binding against it. So nothing here knows `deltas/`, the binding, our reader of
adapters or its maps of names: two maps that agree were not made by one mistake.
"""
