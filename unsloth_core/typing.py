"""The legend: one letter per dimension, everywhere in this project.

======  =========================================  ======  =======================================
letter  dimension                                  letter  dimension
======  =========================================  ======  =======================================
N       tokens (one packed axis)                   Q       H·K, width of all query heads together
M       rows that carry a target; keys             R       G·K, width of all key (or value) heads
D       model width (the residual stream)          S       segments (packed sequences)
H       query heads                                B, T    batch and length of an unpacked batch
G       key/value heads                            C       inner dimension of a product
K       size of one head                           J       rotated channel pairs of a head
F       width of the MLP                           E       experts
V       vocabulary                                 L       layers
T       experts of a token (beside an E)           I       width of one expert's MLP
P       rows sorted by expert, N·T of them
======  =========================================  ======  =======================================

Names carry their letters as a suffix: ``x_ND`` is (tokens, model width), ``gate_up_2FD`` a stacked weight of 2·F rows.
"""
