//! Raw sets to shards: every record is written or counted, and a killed ingest goes on exactly.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use flate2::write::GzEncoder;
use nitro_data::image::{decode, encode_jpeg};
use nitro_data::ingest::{
    CAPTION, Folder, IngestOptions, Ingested, JPG, JourneyDb, ParquetPictures, ParquetRows,
    PictureRules, Source, Tars, ingest, text_column,
};
use nitro_data::job::{Share, Tally};
use nitro_data::mds::{Dataset, WriterOptions};
use nitro_data::{DataError, Result};
use parquet::data_type::{ByteArray, ByteArrayType, Int32Type};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

fn jpeg(side: u32, shade: u8) -> Vec<u8> {
    let picture = image::RgbImage::from_pixel(side, side + 3, image::Rgb([shade, 90, 200]));
    encode_jpeg(&picture, 90).unwrap()
}

fn options() -> IngestOptions {
    IngestOptions {
        pictures: PictureRules::default(),
        writer: WriterOptions {
            size_limit: 3000,
            ..Default::default()
        },
        limit: None,
        share: Share::WHOLE,
    }
}

fn run(source: &dyn Source, out: &Path, options: &IngestOptions) -> Ingested {
    ingest(source, out, options, &mut |_| true).unwrap()
}

fn captions(dir: &Path) -> Vec<String> {
    let dataset = Dataset::open(dir).unwrap();
    let caption = |i| dataset.sample(i).unwrap().text(CAPTION).unwrap().to_owned();
    (0..dataset.len()).map(caption).collect()
}

fn skipped(tally: &Tally) -> Vec<(&str, u64)> {
    tally
        .skipped
        .iter()
        .map(|(reason, s)| (reason.as_str(), s.count))
        .collect()
}

/// Name, bytes and caption of a picture file.
type Bad<'a> = (&'a str, &'a [u8], Option<&'a [u8]>);

/// A folder with good pictures and one of every kind of bad one.
fn folder(dir: &Path, good: u32) {
    fs::create_dir_all(dir.join("sub")).unwrap();
    for i in 0..good {
        let name = dir
            .join(if i % 2 == 0 { "sub" } else { "." })
            .join(format!("{i:03}"));
        fs::write(name.with_extension("jpg"), jpeg(16 + i % 7, i as u8)).unwrap();
        fs::write(name.with_extension("txt"), format!(" caption {i}\n")).unwrap();
    }
    let bad: [Bad<'_>; 5] = [
        ("lonely.jpg", &jpeg(16, 1), None),
        ("mute.jpg", &jpeg(16, 2), Some(b"  \n")),
        ("latin.jpg", &jpeg(16, 3), Some(b"caf\xe9")),
        ("cut.jpg", &jpeg(64, 4)[..300], Some(b"cut off")),
        ("text.png", b"no picture at all", Some(b"not a picture")),
    ];
    for (name, picture, caption) in bad {
        fs::write(dir.join(name), picture).unwrap();
        if let Some(caption) = caption {
            fs::write(dir.join(name).with_extension("txt"), caption).unwrap();
        }
    }
}

#[test]
fn a_folder_is_ingested_and_what_is_left_out_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    let (raw, out) = (dir.path().join("raw"), dir.path().join("out"));
    folder(&raw, 20);
    let source = Folder::open(&raw, None, "txt").unwrap();
    let done = run(&source, &out, &options());
    assert_eq!(
        (done.tally.written, done.tally.seen(), done.complete),
        (20, 25, true)
    );
    assert_eq!(
        skipped(&done.tally),
        [
            ("caption is not UTF-8", 1),
            ("empty caption", 1),
            ("no caption", 1),
            ("undecodable picture", 2)
        ]
    );
    assert!(done.tally.skipped["no caption"].examples[0].contains("lonely.jpg"));
    let mut found = captions(&out);
    found.sort();
    let mut expected: Vec<String> = (0..20).map(|i| format!("caption {i}")).collect();
    expected.sort();
    assert_eq!(found, expected);
    // JPEG files are copied byte for byte.
    let sample = Dataset::open(&out).unwrap().sample(0).unwrap();
    let number: u32 = sample.text(CAPTION).unwrap()[8..].parse().unwrap();
    assert_eq!(
        sample.bytes(JPG).unwrap(),
        jpeg(16 + number % 7, number as u8)
    );
    // Again: nothing to do, the same answer.
    let again = run(&source, &out, &options());
    assert_eq!((&again.tally, &again.before), (&done.tally, &done.tally));
}

#[test]
fn a_killed_ingest_goes_on_and_ends_like_an_unbroken_one() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("raw");
    folder(&raw, 300);
    let source = Folder::open(&raw, None, "txt").unwrap();
    let whole = run(&source, &dir.path().join("whole"), &options());
    let broken = dir.path().join("broken");
    let mut runs = 0;
    let done = loop {
        let mut calls = 0;
        let result = ingest(&source, &broken, &options(), &mut |_| {
            calls += 1;
            calls < 2
        });
        runs += 1;
        match result {
            Ok(done) => break done,
            Err(error) => assert_eq!(error, DataError::Stopped),
        }
    };
    assert!(runs > 2);
    assert_eq!(done.tally, whole.tally);
    assert_eq!(captions(&broken), captions(&dir.path().join("whole")));
    // A source that changed is not continued.
    fs::write(raw.join("new.jpg"), jpeg(16, 0)).unwrap();
    let changed = Folder::open(&raw, None, "txt").unwrap();
    let error = ingest(&changed, &broken, &options(), &mut |_| true).unwrap_err();
    assert!(error.to_string().contains("another job"), "{error}");
}

#[test]
fn rules_for_pictures_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("raw");
    fs::create_dir(&raw).unwrap();
    for (name, side) in [("a", 10), ("b", 40), ("c", 100)] {
        fs::write(raw.join(name).with_extension("jpg"), jpeg(side, 9)).unwrap();
        fs::write(raw.join(name).with_extension("txt"), name).unwrap();
    }
    let options = IngestOptions {
        pictures: PictureRules {
            min_side: 20,
            max_side: Some(50),
            ..Default::default()
        },
        ..options()
    };
    let source = Folder::open(&raw, None, "txt").unwrap();
    let done = run(&source, &dir.path().join("out"), &options);
    assert_eq!(
        skipped(&done.tally),
        [("smaller than the smallest side", 1)]
    );
    let dataset = Dataset::open(dir.path().join("out")).unwrap();
    let size = |i: usize| {
        dataset
            .sample(i)
            .unwrap()
            .picture(JPG)
            .unwrap()
            .dimensions()
    };
    assert_eq!((size(0), size(1)), ((40, 43), (50, 51)));
}

#[test]
fn ranks_share_a_source_and_miss_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (annotations, out) = (dir.path().join("a.jsonl"), dir.path().join("out"));
    let images = dir.path().join("imgs/000");
    fs::create_dir_all(&images).unwrap();
    fs::write(images.join("x.jpg"), jpeg(16, 7)).unwrap();
    // Several units of 4 MiB: lines of very different length.
    let mut text = String::new();
    for i in 0..220 {
        let path = if i % 10 == 3 {
            "./000/none.jpg"
        } else {
            "./000/x.jpg"
        };
        let padding = "x".repeat(if i % 3 == 0 { 150_000 } else { 10 });
        text += &format!(
            "{{\"prompt\": \"p{i}\", \"img_path\": \"{path}\", \"pad\": \"{padding}\"}}\n"
        );
    }
    text += "not json\n{\"prompt\": \"no path\"}\n\n{\"prompt\": \"up\", \"img_path\": \"../../../etc/x.jpg\"}";
    fs::write(&annotations, text).unwrap();
    let source = JourneyDb::open(&annotations, images.parent().unwrap(), "prompt").unwrap();
    assert!(source.units() >= 3);
    let mut all = Tally::default();
    for rank in 0..2 {
        let options = IngestOptions {
            share: Share { rank, ranks: 2 },
            ..options()
        };
        let done = run(&source, &out, &options);
        assert_eq!(done.complete, rank == 1);
        all.written += done.tally.written;
        for (reason, skipped) in done.tally.skipped {
            all.skipped.entry(reason).or_default().count += skipped.count;
        }
    }
    assert_eq!(all.seen(), 223);
    assert_eq!(all.skipped["no picture"].count, 22);
    assert_eq!(all.skipped["annotation is not JSON"].count, 1);
    assert_eq!(all.skipped["annotation lacks a field"].count, 1);
    assert_eq!(all.skipped["picture outside of the folder"].count, 1);
    let mut found = captions(&out);
    found.sort();
    found.dedup();
    assert_eq!(found.len(), 198);
}

fn tar(path: &Path, entries: &[(&str, &[u8])]) {
    let mut builder = tar::Builder::new(fs::File::create(path).unwrap());
    for (name, bytes) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, *bytes).unwrap();
    }
    builder.finish().unwrap();
}

#[test]
fn tars_of_webdataset_and_sa1b() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("raw");
    fs::create_dir(&raw).unwrap();
    let picture = jpeg(20, 5);
    let entries: [(&str, &[u8]); 8] = [
        ("d/0001.jpg", &picture),
        ("d/0001.txt", b"from txt"),
        ("d/0002.json", br#"{"caption": "from json", "url": 3}"#),
        ("d/0002.jpg", &picture),
        ("d/0003.jpg", &picture),
        ("d/0003.json", br#"{"url": 3}"#),
        ("d/0004.txt", b"no picture, no record"),
        ("d/0005.jpg", &picture),
    ];
    tar(&raw.join("a.tar"), &entries);
    let web = Tars::open(&raw, None, "caption").unwrap();
    let done = run(&web, &dir.path().join("web"), &options());
    assert_eq!(captions(&dir.path().join("web")), ["from txt", "from json"]);
    assert_eq!(skipped(&done.tally), [("no caption", 2)]);

    let folder = dir.path().join("captions");
    fs::create_dir(&folder).unwrap();
    for (name, text) in [("0001", "one"), ("0003", "three"), ("0005", "five")] {
        fs::write(folder.join(name).with_extension("txt"), text).unwrap();
    }
    let sa1b = Tars::open(&raw, Some(&folder), "caption").unwrap();
    let done = run(&sa1b, &dir.path().join("sa1b"), &options());
    assert_eq!(captions(&dir.path().join("sa1b")), ["one", "three", "five"]);
    assert_eq!(skipped(&done.tally), [("no caption", 1)]);

    // The same in gzip's clothes, also in several members and under another name.
    let packed = dir.path().join("packed");
    fs::create_dir(&packed).unwrap();
    let bytes = fs::read(raw.join("a.tar")).unwrap();
    let member = |part: &[u8]| {
        let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(part).unwrap();
        encoder.finish().unwrap()
    };
    let members = [member(&bytes[..1000]), member(&bytes[1000..])].concat();
    fs::write(packed.join("a.tar.gz"), &members).unwrap();
    fs::write(packed.join("b.tgz"), member(&bytes)).unwrap();
    let gz = Tars::open(&packed, None, "caption").unwrap();
    run(&gz, &dir.path().join("gz"), &options());
    let twice = ["from txt", "from json", "from txt", "from json"];
    assert_eq!(captions(&dir.path().join("gz")), twice);
    fs::write(packed.join("b.tgz"), &members[..members.len() / 2]).unwrap();
    let done = run(&gz, &dir.path().join("cut-gz"), &options());
    assert_eq!(done.tally.skipped["damaged tar, rest not read"].count, 1);

    // A tar that ends early gives what is whole and is counted.
    let bytes = fs::read(raw.join("a.tar")).unwrap();
    fs::write(raw.join("a.tar"), &bytes[..1700]).unwrap();
    let done = run(&web, &dir.path().join("cut"), &options());
    assert_eq!(done.tally.skipped["damaged tar, rest not read"].count, 1);
}

/// Picture bytes, caption, part and name; `None` is null.
type Row<'a> = (Option<&'a [u8]>, Option<&'a str>, i32, &'a str);

fn parquet(path: &Path, rows: &[Row<'_>]) {
    let schema = "message m { optional group image { optional binary bytes; } \
                  optional binary text (UTF8); required int32 part_id; \
                  required binary image_name (UTF8); }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let file = fs::File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, Default::default()).unwrap();
    for rows in rows.chunks(2) {
        let mut group = writer.next_row_group().unwrap();
        let optional = |values: Vec<Option<Vec<u8>>>, there: i16| {
            let levels: Vec<i16> = values
                .iter()
                .map(|v| if v.is_some() { there } else { 0 })
                .collect();
            let bytes: Vec<ByteArray> = values.into_iter().flatten().map(ByteArray::from).collect();
            (bytes, levels)
        };
        let pictures = rows.iter().map(|r| r.0.map(<[u8]>::to_vec)).collect();
        let texts = rows
            .iter()
            .map(|r| r.1.map(|t| t.as_bytes().to_vec()))
            .collect();
        for (values, levels) in [optional(pictures, 2), optional(texts, 1)] {
            let mut column = group.next_column().unwrap().unwrap();
            let typed = column.typed::<ByteArrayType>();
            typed.write_batch(&values, Some(&levels), None).unwrap();
            column.close().unwrap();
        }
        let parts: Vec<i32> = rows.iter().map(|r| r.2).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column
            .typed::<Int32Type>()
            .write_batch(&parts, None, None)
            .unwrap();
        column.close().unwrap();
        let names: Vec<ByteArray> = rows.iter().map(|r| ByteArray::from(r.3)).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column
            .typed::<ByteArrayType>()
            .write_batch(&names, None, None)
            .unwrap();
        column.close().unwrap();
        group.close().unwrap();
    }
    writer.close().unwrap();
}

#[test]
fn parquet_rows_with_pictures_in_a_column_in_files_and_without() -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("raw");
    fs::create_dir_all(dir.path().join("images/part-000007")).unwrap();
    fs::create_dir(&raw).unwrap();
    let picture = jpeg(12, 8);
    fs::write(dir.path().join("images/part-000007/a.png"), &picture).unwrap();
    let rows = [
        (Some(picture.as_slice()), Some("one"), 7, "a.png"),
        (None, Some("two"), 7, "b.png"),
        (Some(picture.as_slice()), None, 7, "a.png"),
        (Some(b"x".as_slice()), Some("four"), 8, "a.png"),
        (Some(picture.as_slice()), Some("five"), 7, "a.png"),
    ];
    parquet(&raw.join("rows.parquet"), &rows);
    let open = |pictures| ParquetRows::open(&raw, "text", pictures);

    let column = open(ParquetPictures::Column("image".into()))?;
    assert_eq!(column.units(), 3);
    let done = run(&column, &dir.path().join("column"), &options());
    assert_eq!(captions(&dir.path().join("column")), ["one", "five"]);
    let expected = [
        ("no caption", 1),
        ("no picture", 1),
        ("undecodable picture", 1),
    ];
    assert_eq!(skipped(&done.tally), expected);
    let first = Dataset::open(dir.path().join("column"))?.sample(0)?;
    assert_eq!(decode(first.bytes(JPG)?).unwrap().dimensions(), (12, 15));

    let files = open(ParquetPictures::DiffusionDb(dir.path().join("images")))?;
    let done = run(&files, &dir.path().join("files"), &options());
    assert_eq!(captions(&dir.path().join("files")), ["one", "five"]);
    assert_eq!(skipped(&done.tally), [("no caption", 1), ("no picture", 2)]);

    let prompts = open(ParquetPictures::None)?;
    run(&prompts, &dir.path().join("prompts"), &options());
    assert_eq!(
        captions(&dir.path().join("prompts")),
        ["one", "two", "four", "five"]
    );
    let dataset = Dataset::open(dir.path().join("prompts"))?;
    assert!(!dataset.sample(0)?.has(JPG));
    assert_eq!(
        text_column(&raw, "text")?,
        ["one", "two", "", "four", "five"]
    );

    let missing = ParquetRows::open(&raw, "re_caption", ParquetPictures::None).unwrap_err();
    let said = missing.to_string();
    assert!(
        said.contains("re_caption") && said.contains("image_name"),
        "{said}"
    );
    Ok(())
}
