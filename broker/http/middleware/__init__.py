"""What happens around every request, outermost first: observe, CORS, auth."""
