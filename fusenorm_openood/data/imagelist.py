"""The old name of `fusenorm_openood.data.lists`."""

from fusenorm_openood.data.lists import ImageList as ImageList
from fusenorm_openood.data.lists import read_imagelist as read_imagelist
