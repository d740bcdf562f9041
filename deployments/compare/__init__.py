"""`headroom compare`: one model on one machine, in several quantisations, each in a process of its own."""
