"""An object store on this machine, as for the tests of the store itself."""

from tests.experiment.conftest import s3_endpoint, s3_environment

__all__ = ["s3_endpoint", "s3_environment"]
