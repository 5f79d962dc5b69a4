"""One module per outside system; none imports another. Each turns its system's failures into keyrotation.domain.errors."""
