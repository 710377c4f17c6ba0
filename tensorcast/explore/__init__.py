"""`tensorcast explore`: a comparison as a page whose sliders ask anew, served on this machine."""
