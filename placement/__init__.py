"""Placement: what each GPU will hold, to the byte, before anything loads. Imports neither torch nor ray."""
