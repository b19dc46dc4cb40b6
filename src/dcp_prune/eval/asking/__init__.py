"""Images and questions in, answers out: one runner for every product."""
