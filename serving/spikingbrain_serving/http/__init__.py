"""The server: routes in the shape of OpenAI, limits, metrics and a page."""
