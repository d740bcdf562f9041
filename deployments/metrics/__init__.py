"""What the service says of itself: measured where it happens, carried by reports, shown on one page."""
