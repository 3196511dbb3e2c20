"""Pascal VOC and CVAT: the ways to write them, and what is refused."""

from pathlib import Path

import pytest
from PIL import Image

from detr_dist.data.coco import load_data
from detr_dist.data.formats import Split, read_annotations, split_names
from detr_dist.errors import DataError

BOX = "<bndbox>\n<xmin>5</xmin>\n<ymin>6</ymin>\n<xmax>25</xmax>\n<ymax>16.5</ymax>\n</bndbox>"
OBJECT = f"<object>\n<name>ball</name>\n<difficult>1</difficult>\n{BOX}\n</object>"
SIZE = "<size><width>60</width><height>40</height></size>"


def write_voc(folder: Path, name: str = "a", body: str = SIZE + OBJECT, image: str = "a.jpg") -> Path:
    for place in ("Annotations", "JPEGImages"):
        (folder / place).mkdir(exist_ok=True)
    if image:
        Image.new("RGB", (60, 40)).save(folder / "JPEGImages" / image, format="jpeg")
    xml = f"<?xml version='1.0'?>\n<annotation>\n<filename>{image}</filename>\n{body}\n</annotation>\n"
    (folder / "Annotations" / f"{name}.xml").write_text(xml, encoding="utf-8")
    return folder


def test_coordinates_of_voc_are_edges_and_difficult_objects_are_kept(tmp_path: Path) -> None:
    data = load_data(write_voc(tmp_path))
    assert data.boxes_xywh_px.tolist() == [[5, 6, 20, 10.5]]
    assert data.class_names == ("ball",)
    assert data.num_boxes.tolist() == [1]


def test_the_files_of_pascal_itself_count_pixels_from_one(tmp_path: Path) -> None:
    source = "<source><database>The VOC2007 Database</database></source>"
    data = load_data(write_voc(tmp_path, body=source + SIZE + OBJECT))
    assert data.boxes_xywh_px.tolist() == [[4, 5, 21, 11.5]]


def test_a_list_or_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (write_voc(tmp_path) / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(DataError, match=r"train\.txt: cannot be read: not a text in UTF-8; save it again"):
        load_data(tmp_path)
    (tmp_path / "annotations").symlink_to("annotations")
    with pytest.raises(DataError, match="annotations: cannot be listed: Too many levels of symbolic links"):
        load_data(tmp_path)


@pytest.mark.parametrize("size", ["", "<size><width>0</width><height>0</height></size>"])
def test_a_size_that_voc_lacks_is_read_from_the_image(tmp_path: Path, size: str) -> None:
    assert load_data(write_voc(tmp_path, body=size + OBJECT)).sizes_hw.tolist() == [[40, 60]]


def test_an_image_of_voc_is_found_by_the_name_of_its_xml_or_by_the_name_in_it(tmp_path: Path) -> None:
    write_voc(tmp_path, name="night 1", image="night 1.JPG")
    write_voc(tmp_path, name="été", image="other.jpg")
    data = load_data(tmp_path)
    assert [data.image_path(row).name for row in range(2)] == ["night 1.JPG", "other.jpg"]


def test_lists_of_voc_may_mark_a_class(tmp_path: Path) -> None:
    for name in ("a", "b 1", "c"):
        write_voc(tmp_path, name=name, image=f"{name}.jpg")
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "trainval.txt").write_bytes(b"\xef\xbb\xbfc  1\r\nb 1\r\n")
    (lists / "val.txt").write_text("a -1\nnowhere\n")
    (lists / "ball_train.txt").write_text("a 1\n")
    assert split_names(tmp_path) == ("train", "val")
    train = load_data(Split(tmp_path, "train"))
    assert [train.image_path(row).name for row in range(2)] == ["c.jpg", "b 1.jpg"]
    with pytest.raises(DataError, match=r"1 line that names an image without an XML.*: val.txt:2: nowhere"):
        load_data(Split(tmp_path, "val"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (OBJECT.replace("<name>ball</name>", ""), r"Annotations/a.xml:4: has no 'name'"),
        (OBJECT.replace("bndbox", "robndbox"), r"Annotations/a.xml:4: 'ball' has no 'bndbox'"),
        (OBJECT.replace(">25<", ">x<"), r"Annotations/a.xml:10: xmax 'x' is no number"),
        (OBJECT.replace(">25<", ">nan<"), r"Annotations/a.xml:10: xmax 'nan' is no number"),
        (OBJECT.replace("<xmax>25</xmax>", ""), r"Annotations/a.xml:7: has no 'xmax'"),
        (OBJECT.replace(">25<", ">4<"), r"1 box of negative width.*: Annotations/a.xml:7: xmin 5, .* xmax 4"),
        ("</annotation>", r"a.xml:5: broken XML"),
        ("<object>", r"a.xml:5: broken XML: mismatched tag"),
    ],
)
def test_faulty_objects_of_voc_are_named(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_data(write_voc(tmp_path, body=SIZE.replace("\n", "") + body if body[1] != "/" else body))
    assert "\n" not in str(caught.value)


def test_voc_without_the_image_or_with_two_of_them_is_refused(tmp_path: Path) -> None:
    write_voc(tmp_path, name="b", image="")
    with pytest.raises(DataError, match=r"1 XML file without its image; .*: Annotations/b.xml: b"):
        load_data(write_voc(tmp_path))
    write_voc(tmp_path, name="b", image="b.jpg")
    (tmp_path / "JPEGImages" / "b.png").write_bytes(b"")
    (tmp_path / "Annotations" / "b.xml").write_text("<annotation/>")
    with pytest.raises(DataError, match=r"several images of its name.*: Annotations/b.xml: b.jpg and b.png"):
        load_data(tmp_path)


def test_declarations_of_entities_are_refused(tmp_path: Path) -> None:
    write_voc(tmp_path)
    bomb = '<!DOCTYPE a [<!ENTITY b "bbbb"><!ENTITY c "&b;&b;">]>\n<annotation><x>&c;</x></annotation>'
    (tmp_path / "Annotations" / "a.xml").write_text(bomb)
    with pytest.raises(DataError, match=r"a.xml:1: declares an XML entity, which is refused"):
        load_data(tmp_path)


LABELS = "<label><name>player</name></label>\n<label><name>ball</name></label>"
META = f"<meta><task><labels>{LABELS}</labels></task></meta>"


def write_cvat(folder: Path, *shapes: str, meta: str = META, image: str = 'name="a 1.jpg"') -> Path:
    (folder / "images").mkdir(exist_ok=True)
    Image.new("RGB", (60, 40)).save(folder / "images" / "a 1.jpg")
    body = "\n".join(shapes)
    start = f'<annotations>\n{meta}\n<image id="7" {image} width="60" height="40">'
    (folder / "annotations.xml").write_text(f"{start}\n{body}\n</image></annotations>")
    return folder / "annotations.xml"


def cvat_box(label: str = "ball", xbr: str = "30", **more: str) -> str:
    rest = "".join(f' {key}="{value}"' for key, value in more.items())
    return f'<box label="{label}" xtl="10" ytl="5" xbr="{xbr}" ybr="15.5"{rest}></box>'


def test_boxes_and_polygons_of_cvat_are_read(tmp_path: Path) -> None:
    polygon = '<polygon label="player" points="1.00,2.00;11.50,2.00;6.00,9.00"></polygon>'
    data = load_data(write_cvat(tmp_path, cvat_box(), polygon, cvat_box(rotation="90.0")))
    assert data.class_names == ("player", "ball")
    assert data.box_classes.tolist() == [1, 0, 1]
    assert data.boxes_xywh_px.round(6).tolist() == [
        [10, 5, 20, 10.5],
        [1, 2, 10.5, 7],
        [14.75, 0.25, 10.5, 20],
    ]
    assert data.image_path(0).name == "a 1.jpg"


def test_shapes_of_cvat_that_are_not_used_are_counted(tmp_path: Path) -> None:
    shapes = ['<points label="ball" points="1,2"/>', '<mask label="ball"/>', '<mask label="ball"/>']
    notices = load_data(write_cvat(tmp_path, *shapes, '<tag label="ball"/>')).notices
    assert "3 shapes that are neither boxes nor polygons; they are not used: 2 mask, 1 points" in notices[0]


def test_subsets_of_cvat_are_splits(tmp_path: Path) -> None:
    path = write_cvat(tmp_path, cvat_box(), image='name="a 1.jpg" subset="Validation"')
    assert split_names(path) == split_names(tmp_path) == ("val",)
    assert str(read_annotations(path, "val").path) == f"{path} (val)"
    assert split_names(write_cvat(tmp_path, image='name="a 1.jpg" subset="default"')) == ()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (cvat_box("goal"), r"1 shape with a label that the task does not list.*annotations.xml:5: 'goal'"),
        (cvat_box(xbr="nan"), r"annotations.xml:5: box without finite numbers"),
        (cvat_box(xbr="x"), r"annotations.xml:5: box without finite numbers"),
        ('<box label="ball"/>', r"annotations.xml:5: box without finite numbers"),
        ('<polygon label="ball" points="1,2;3"/>', r"annotations.xml:5: polygon without finite numbers"),
        (cvat_box(xbr="3"), r"1 box of negative width.*annotations.xml:5: xtl 10, ytl 5, xbr 3, ybr 15.5"),
        ("<box", r"annotations.xml:6: broken XML: not well-formed"),
    ],
)
def test_faulty_shapes_of_cvat_are_named(tmp_path: Path, shape: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(write_cvat(tmp_path, shape))


def test_cvat_without_labels_or_with_an_unknown_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'meta' lists no labels"):
        load_data(write_cvat(tmp_path, meta="<meta/>"))
    with pytest.raises(DataError, match=r"1 image of 1 missing in .*images/nowhere.jpg"):
        load_data(write_cvat(tmp_path, image='name="nowhere.jpg"'))
    with pytest.raises(DataError, match=r"annotations.xml:4: name, width or height is missing"):
        load_data(write_cvat(tmp_path, image=""))
