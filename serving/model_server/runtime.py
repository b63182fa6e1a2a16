"""The parts of TensorFlow that a server needs, without ``import tensorflow``.

``tensorflow/__init__.py`` imports the whole public API: 2,400 modules, 5.5 s of CPU time and 216 MB of own memory. A
session and the SavedModel loader need 700 of them: 1.8 s and 125 MB. So unless TensorFlow is imported already, a bare
package of that name stands in for it, through which its submodules are found. Nothing else in a server's process may
expect ``tf.anything``. These are TensorFlow's own modules behind the public names in the comments; requirements/ pins
its minor version, and the tests here run against it.
"""

import importlib.util
import logging
import sys
import types
import warnings

if "tensorflow" not in sys.modules:
    _spec = importlib.util.find_spec("tensorflow")
    if _spec is None or _spec.submodule_search_locations is None:
        raise ModuleNotFoundError("tensorflow is not installed; requirements/model-server.txt has it")
    _bare = types.ModuleType("tensorflow", "Stands in for the package; see serving.model_server.runtime.")
    _bare.__spec__ = _spec
    _bare.__path__ = list(_spec.submodule_search_locations)
    sys.modules["tensorflow"] = _bare

# mypy: ignore-errors
from tensorflow.lite.python.interpreter import Interpreter as TfLiteInterpreter  # tf.lite.Interpreter
from tensorflow.python.client.session import Session  # tf.compat.v1.Session
from tensorflow.python.framework.dtypes import as_dtype  # tf.as_dtype
from tensorflow.python.framework.errors_impl import OpError  # tf.errors.OpError
from tensorflow.python.framework.ops import Graph  # tf.Graph
from tensorflow.python.lib.io.tf_record import tf_record_iterator  # tf.compat.v1.io.tf_record_iterator
from tensorflow.python.saved_model.loader_impl import SavedModelLoader  # tf.compat.v1.saved_model.load

# It says at each use that its successor is another package.
warnings.filterwarnings("ignore", message=r"\s*Warning: tf\.lite\.Interpreter is deprecated")
# Its loader and reader for sessions are called deprecated at each use.
logging.getLogger("tensorflow").setLevel(logging.ERROR)

__all__ = ["Graph", "OpError", "SavedModelLoader", "Session", "TfLiteInterpreter", "as_dtype", "tf_record_iterator"]
