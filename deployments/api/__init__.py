"""HTTP, and the only place where there is text. See `app.create_api`."""
