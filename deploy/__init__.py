"""What runs the gateway and watches over it, as far as it is made by code."""
