"""Where `stream(save_to=...)` puts images: a folder, or a bucket of object storage.

`ObjectStorage` needs the extra `object-storage`: `pip install 'flux2max_async[object-storage]'`.
"""

from flux2max_async._exceptions import StorageError
from flux2max_async.storage._local import LocalStorage
from flux2max_async.storage._objects import ObjectStorage
from flux2max_async.storage._protocol import Storage, StoredImage

__all__ = ["LocalStorage", "ObjectStorage", "Storage", "StorageError", "StoredImage"]
